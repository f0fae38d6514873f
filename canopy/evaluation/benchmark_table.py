"""The results table of a benchmark: rows are appended to results.csv, and results.md shows them all."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from canopy import __version__
from canopy.errors import DataError
from canopy.evaluation.benchmark import BenchmarkResult
from canopy.evaluation.benchmark_manifest import METRICS, BenchmarkManifest
from canopy.evaluation.page import number_text
from canopy.evaluation.result import Scores
from canopy.files import replacing

KEY = ("benchmark", "group", "site", "model", "model_sha256", "canopy_version")
FACTS = (*KEY, "scored", "scenes", "trained_here")
ALL_SITES = "all"
SHORT = {
    "n": "pixels", "mae_m": "MAE m", "rmse_m": "RMSE m", "bias_m": "bias m", "r2": "R2",
    "block_r2": "block-R2", "edge_error": "edge", "nmae": "nMAE",
    "cover_iou_2m": "IoU 2 m", "cover_iou_5m": "IoU 5 m",
    "p95_error_m": "p95 error m", "nmae_plus1": "nMAE (1 + h)",
}  # fmt: skip
COLUMNS = (*FACTS, *(c for m in METRICS for c in ((m,) if m == "n" else (m, f"{m}_low95", f"{m}_high95"))))


def rows_of(result: BenchmarkResult, today: str | None = None) -> list[dict[str, Any]]:
    """One row per group and per site of it, all columns of results.csv."""
    rows = []
    for part in result.groups:
        facts = {
            "benchmark": result.manifest.name,
            "group": part.group,
            "site": ALL_SITES,
            "model": result.model.name,
            "model_sha256": result.model.sha256,
            "canopy_version": __version__,
            "scored": today or datetime.date.today().isoformat(),
            "scenes": part.scenes,
            "trained_here": part.leak.seen if part.leak else "unknown",
        }
        rows.append(facts | _numbers(part.evaluation.overall))
        for stratum in part.evaluation.strata:
            if stratum.by == "site":
                rows.append(facts | {"site": stratum.name, "scenes": ""} | _numbers(stratum.scores))
    return rows


def _numbers(scores: Scores) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name in METRICS:
        score = scores.metrics.get(name)
        plain[name] = "" if score is None or score.value is None else score.value
        if name != "n":
            low, high = (score.ci95 or ("", "")) if score is not None else ("", "")
            plain[f"{name}_low95"], plain[f"{name}_high95"] = low, high
    return plain


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Add rows to results.csv; a row of the same model, group and version takes the old one's place.

    Returns all rows, as texts. Raises DataError for a table of another layout.
    """
    kept: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise DataError(
                    "a table of another layout", where=path, remedy="move it away, or choose another -o"
                )
            kept = list(reader)
    new = [{name: _text(row.get(name, "")) for name in COLUMNS} for row in rows]
    keys = {tuple(row[k] for k in KEY) for row in new}
    merged = [row for row in kept if tuple(row[k] for k in KEY) not in keys] + new
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(merged)
    return merged


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def markdown(manifest: BenchmarkManifest, rows: Sequence[Mapping[str, str]]) -> str:
    """The table for people: groups, models one under the other, published scores, who has seen the place."""
    metrics = [m for m in manifest.metrics if m != "n"]
    lines = [f"# {manifest.name}: {manifest.title}", ""]
    head = ["group", "model", "trained here?", "pixels", *(SHORT.get(m, m) for m in metrics)]
    lines += [_line(head), _line(["---", "---", "---", *("---:" for _ in head[3:])])]
    for name, group in manifest.groups.items():
        here = [r for r in rows if r["benchmark"] == manifest.name and r["group"] == name]
        sites = [ALL_SITES, *dict.fromkeys(r["site"] for r in here if r["site"] != ALL_SITES)]
        for site in sites if group.per_site and len(sites) > 2 else [ALL_SITES]:
            title = group.title if site == ALL_SITES else f"… {site}"
            for row in (r for r in here if r["site"] == site):
                lines.append(
                    _line([f"{name}: {title}" if site == ALL_SITES else title, *_cells(row, metrics)])
                )
    lines.append("")
    if manifest.published:
        lines += ["Published by others, for orientation:", ""]
        names = [m for m in manifest.metrics if any(m in p.scores for p in manifest.published)]
        names += [m for p in manifest.published for m in p.scores if m not in names]
        names = list(dict.fromkeys(names))
        lines.append(
            _line(["model", *(SHORT.get(m, m) for m in names), "measured on", "same scenes and rules?"])
        )
        lines.append(_line(["---", *("---:" for _ in names), "---", "---"]))
        for entry in manifest.published:
            values = [number_text(entry.scores[m]) if m in entry.scores else "" for m in names]
            on = "; ".join(t for t in (f"{entry.measured_on} ({entry.source})", entry.note) if t)
            lines.append(_line([entry.model, *values, on, "yes" if entry.comparable else "no"]))
        lines.append("")
    lines += ["Trained here?", ""]
    for leak in manifest.leakage:
        where = f" ({', '.join(leak.groups)})" if leak.groups else ""
        lines.append(f"- {', '.join(leak.models)}{where}: **{leak.seen}**, {leak.why} [{leak.source}]")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, str], metrics: Sequence[str]) -> list[str]:
    cells = [
        f"{row['model']} `{row['model_sha256'][:8]}`",
        row["trained_here"],
        f"{int(float(row['n'] or 0)):,}",
    ]
    for metric in metrics:
        text = number_text(float(row[metric])) if row[metric] else ""
        low, high = row[f"{metric}_low95"], row[f"{metric}_high95"]
        if metric == "mae_m" and low and high:
            text += f" ({number_text(float(low))}-{number_text(float(high))})"
        cells.append(text)
    return cells


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
