"""results.csv and results.md of a matrix: every run's scores, every site's, and what was run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from canopy.files import replacing
from canopy.training.scoring import Table, headline

RESULTS = "results.csv"
SHOWN = ("mae_m", "r", "r2", "bias_m", "block_r2", "edge_error", "bias_20-30_m", "bias_30-60_m")
FACTS = ("run", "name", "fold", "share", "seed", "steps", "minutes", "parameters")
ORIGIN = ("started_from", "exported", "data", "commit", "hardware", "date", "command")
_POOLED = ("all but plots", "plots", "all")


def summary(scores: dict[str, Table]) -> dict[str, float | None]:
    """Columns of results.csv: every split's row that chooses between models."""
    return {f"{split} {k}": headline(t)[k] for split, t in scores.items() for k in SHOWN}


def write_results(folder: Path) -> None:
    """results.csv and results.md from the scores.json of every run folder."""
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("*/scores.json"))]
    if not found:
        return
    rows = [f["row"] for f in found]
    columns = list(dict.fromkeys([*FACTS, *(k for r in rows for k in r if k not in ORIGIN), *ORIGIN]))
    with replacing(folder / RESULTS) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(folder / "results.md") as part:
        part.write_text(markdown(found))


def markdown(found: list[dict[str, Any]]) -> str:
    """Tables of all runs, of every site's MAE and correlation, of places left out, and of what was run."""
    splits = list(dict.fromkeys(s for f in found for s in f["scores"]))
    heads = [f"{s} {k}" for s in splits for k in SHOWN]
    main = [["run", "min", *heads]]
    sites = [["run", *(f"{s}: {site}" for s in splits for site in _sites(found, s))]]
    origin = [["run", *ORIGIN]]
    for f in found:
        row = f["row"]
        main.append([row["run"], _text(row.get("minutes")), *(_text(row.get(h)) for h in heads)])
        cells = [f["scores"].get(s, {}).get(site) for s in splits for site in _sites(found, s)]
        sites.append([row["run"], *map(_cell, cells)])
        origin.append([row["run"], *(str(row.get(k, "-")) for k in ORIGIN)])
    parts = ["## Scores (without plots)", _table(main), "## MAE in metres (r) of every site", _table(sites)]
    if any(f["row"].get("fold") for f in found):
        parts += ["## Places left out of training: MAE in metres (r)", _table(_left_out(found))]
    return "\n\n".join([*parts, "## What was run", _table(origin)]) + "\n"


def _left_out(found: list[dict[str, Any]]) -> list[list[str]]:
    """One row per kind of run, its folds together: each site as the run that had not seen it scored it."""
    runs: dict[tuple[str, float, int], dict[str, dict[str, float | None]]] = {}
    for f in (f for f in found if f["row"].get("fold")):
        key = (f["row"]["name"], f["row"]["share"], f["row"]["seed"])
        table = f["scores"].get("val", {})
        runs.setdefault(key, {}).update({site: row for site, row in table.items() if site not in _POOLED})
    sites = list(dict.fromkeys(site for table in runs.values() for site in table))
    rows = [["run", "mean of sites", "sites", *sites]]
    for (name, share, seed), table in runs.items():
        means = [_mean([row[k] for row in table.values()]) for k in ("mae_m", "r")]
        cells = [_cell(table.get(site)) for site in sites]
        title = f"{name}-{100 * share:g}pct-s{seed}"
        rows.append([title, f"{_text(means[0])} ({_text(means[1])})", str(len(table)), *cells])
    return rows


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _cell(row: dict[str, float | None] | None) -> str:
    return f"{_text(row['mae_m'])} ({_text(row['r'])})" if row else "-"


def _sites(found: list[dict[str, Any]], split: str) -> list[str]:
    names = dict.fromkeys(k for f in found for k in f["scores"].get(split, {}))
    return [name for name in names if name not in _POOLED]


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
