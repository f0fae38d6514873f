"""The files of a judgement: metrics.json, one table per way of cutting, one of blocks, and the report."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from canopy.errors import InputError
from canopy.evaluation.result import Evaluation, Score, Scores
from canopy.files import replacing, told_as_output

METRICS = "metrics.json"


def check_folder(out: str | Path, overwrite: bool) -> Path:
    """A folder that results may go to. Raises InputError, before any work."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError("a file", where=folder, expected="a folder")
    if (folder / METRICS).exists() and not overwrite:
        raise InputError("holds an evaluation already", where=folder, remedy="use --overwrite to replace it")
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("the folder cannot be written to", where=parent)
    return folder


def write_results(result: Evaluation, out: str | Path) -> list[Path]:
    """Write everything into the folder `out`, metrics.json last; returns the files.

    Raises OutputError when the disk refuses.
    """
    folder = Path(out)
    with told_as_output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [write_tables(result, folder), *_strata_tables(result, folder)]
        written.append(_write_csv(folder / "blocks.csv", *_block_rows(result)))
        # The page and its figures are made by a module of their own.
        if importlib.util.find_spec("canopy.evaluation.report") is not None:
            report = importlib.import_module("canopy.evaluation.report")
            report.write_report(result, folder)
        written.append(_write_text(folder / METRICS, json.dumps(result.to_dict(), indent=2, allow_nan=False)))
    return written


def write_tables(result: Evaluation, folder: Path) -> Path:
    """scores.csv: every metric, plain and with the shift undone, with its interval."""
    rows = list(_score_rows("overall", result.overall))
    if result.corrected is not None:
        rows += _score_rows("shift undone", result.corrected)
    return _write_csv(folder / "scores.csv", ("scores", "metric", "value", "low95", "high95", "note"), rows)


def _score_rows(name: str, scores: Scores) -> Iterator[list[Any]]:
    for metric, score in scores.metrics.items():
        yield [name, metric, *_cells(score), score.note]
    for part in scores.by_height:
        for metric, score in part.scores.items():
            yield [name, f"{metric} at {part.name} m", *_cells(score), score.note]


def _cells(score: Score) -> list[float | None]:
    low, high = score.ci95 or (None, None)
    return [score.value, low, high]


def _strata_tables(result: Evaluation, folder: Path) -> Iterator[Path]:
    """by_NAME.csv: a row per stratum, three columns per metric."""
    ways = dict.fromkeys(stratum.by for stratum in result.strata)
    for by in ways:
        parts = [s for s in result.strata if s.by == by]
        metrics = list(dict.fromkeys(name for part in parts for name in part.scores.metrics))
        head = [by, *(h for m in metrics for h in ((m,) if m == "n" else (m, f"{m}_low95", f"{m}_high95")))]
        rows = []
        for part in parts:
            row: list[Any] = [part.name]
            for metric in metrics:
                cells = _cells(part.scores.metrics.get(metric, Score(None)))
                row += cells[:1] if metric == "n" else cells
            rows.append(row)
        yield _write_csv(folder / f"by_{_file_name(by)}.csv", head, rows)


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)[:60]


def _block_rows(result: Evaluation) -> tuple[Sequence[str], Iterator[list[Any]]]:
    table = result.blocks
    names = (
        "west",
        "south",
        "east",
        "north",
        "lon",
        "lat",
        "n",
        "map_mean_m",
        "reference_mean_m",
        "bias_m",
        "mae_m",
    )
    head = ("site", "crs", *names)
    columns = [getattr(table, name).tolist() for name in names]
    sites = [table.sites[i] for i in table.site.tolist()]
    crs = [table.crs[min(i, len(table.crs) - 1)] for i in table.site.tolist()]
    return head, ([*row] for row in zip(sites, crs, *columns, strict=True))


def _write_csv(path: Path, head: Sequence[str], rows: Any) -> Path:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows([_plain(cell) for cell in row] for row in rows)
    return path


def _plain(cell: Any) -> Any:
    return f"{cell:.6g}" if isinstance(cell, float) and abs(cell) < 1e4 else cell


def _write_text(path: Path, text: str) -> Path:
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return path
