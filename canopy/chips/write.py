"""`canopy data chips`: plan, cut what is not there yet, and say what there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from canopy.chips.cutting import SHARDS, UNREADABLE, cut_shard, read_rows
from canopy.chips.index import IndexRow, write_index
from canopy.chips.plan import FORMAT, CutRules, Shard, plan_shards, read_pairs
from canopy.chips.splits import Place, SplitRules, count_near_test
from canopy.chips.summary import draw_contact_sheet, summarise
from canopy.errors import DataError, InputError, OutputError
from canopy.files import replacing, told_as_output
from canopy.runtime import NoProgress, Progress


def write_chips(
    manifest: str | Path,
    folder: str | Path,
    rules: CutRules | None = None,
    splits: SplitRules | None = None,
    *,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Cut the pairs of a manifest into a folder of shards.

    `folder` gets shards/*.safetensors (chips files, readable with `canopy.chips.store` and
    `canopy.chips.shards`), index.csv and index.parquet, summary.json and contact_sheet.png. Running again
    cuts only what is missing: after a kill, or after rows were added to the manifest. Two runs of equal
    inputs give equal shards, byte for byte, however often they were interrupted.

    Args:
        manifest: see `plan.read_pairs`.
        rules, splits: how to cut and to split.
        limit: only the manifest's first rows.
        workers: processes.
        overwrite: replace what was cut with other rules.
        progress: told about shards.

    Returns:
        summary.json's object, with `cut_now` (shards cut by this call).

    Raises:
        InputError: bad settings or inputs, or the folder holds chips of other settings; nothing is written.
        OutputError: the folder cannot be written.
    """
    rules, splits, progress = rules or CutRules(), splits or SplitRules(), progress or NoProgress()
    folder = Path(folder)
    if workers < 1 or (limit is not None and limit < 1):
        raise InputError("workers and limit must be at least 1")
    settings = {"format": FORMAT, "rules": asdict(rules), "splits": asdict(splits)}
    settings = json.loads(json.dumps(settings))
    _check_folder(folder, settings, overwrite)
    shards = plan_shards(read_pairs(manifest, limit), rules, splits)
    with told_as_output(folder):
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        with replacing(folder / "settings.json") as part:
            part.write_text(json.dumps(settings, indent=2) + "\n")
        for leftover in folder.glob("**/.*.part"):
            leftover.unlink(missing_ok=True)  # of a run that was killed
    progress.start(len(shards), "cutting shards")
    done = [_step(progress, now) for now in _cut_all(shards, folder, workers)]
    rows = _collect(shards, folder)
    if overwrite:
        _remove_others(shards, folder)
    write_index(folder, rows)
    summary = summarise(rows) | {
        "train_chips_within_buffer_of_test": _count_violations(rows, splits.buffer_m),
        "buffer_m": splits.buffer_m,
        "shards": len(shards),  # those all of whose chips were rejected hold an index alone
        "settings": settings,
    }
    with replacing(folder / "summary.json") as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    draw_contact_sheet(folder, rows)
    return summary | {"cut_now": sum(done), "unreadable": sum(r.reason.startswith(UNREADABLE) for r in rows)}


def _step(progress: Progress, now: bool) -> bool:
    progress.advance()
    return now


def _check_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", where=folder, expected="a folder")
    known = folder / "settings.json"
    if overwrite or not folder.exists():
        return
    if not known.is_file():
        if any(folder.iterdir()):
            raise InputError("holds other files", where=folder, remedy="name another folder or --overwrite")
        return
    try:
        before = json.loads(known.read_text())
    except ValueError as error:
        raise DataError("is damaged", where=known, remedy="use --overwrite") from error
    if before != settings:
        raise InputError(
            "holds chips cut with other settings", where=folder, remedy="name another folder or --overwrite"
        )


def _cut_all(shards: list[Shard], folder: Path, workers: int) -> Iterator[bool]:
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            yield cut_shard(shard, folder)
        return
    from multiprocessing import get_context

    # GDAL and forked processes do not go together (fault 45).
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(cut_shard, shard, folder) for shard in shards]):
            yield job.result()


def _collect(shards: list[Shard], folder: Path) -> list[IndexRow]:
    rows: list[IndexRow] = []
    for shard in shards:
        found = read_rows(shard, folder)
        if found is None:
            raise OutputError(
                "a shard was written and cannot be read back", where=folder / SHARDS / shard.name
            )
        rows += found
    return rows


def _remove_others(shards: list[Shard], folder: Path) -> None:
    ours = {shard.name for shard in shards}
    for path in (folder / SHARDS).glob("*"):
        if path.suffix in (".json", ".safetensors") and path.stem not in ours:
            path.unlink(missing_ok=True)


def _count_violations(rows: list[IndexRow], buffer_m: float) -> int:
    """Counted again on what was written, not on what was planned. Test chips that were rejected count too."""
    kept = [r for r in rows if not r.reason or r.split.startswith("test")]
    places = [Place(r.site, r.crs, (r.west, r.south, r.east, r.north), r.split) for r in kept]
    return count_near_test(places, buffer_m)
