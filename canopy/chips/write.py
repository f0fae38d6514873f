"""`canopy data chips`: plan, cut what is not there yet, and say what there is; or draw synthetic chips.

What there is: counts and shifts by split and site (summary.json), and a sheet of samples to look at.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.chips.options import CutOptions, SplitOptions
from canopy.chips.store import (
    INDEX_CSV,
    SETTINGS,
    SHARDS,
    Chip,
    ChipRow,
    ChipShards,
    described,
    read_rows,
    write_index,
    write_shard,
)
from canopy.errors import DataError, InputError
from canopy.files import replacing, told_as_output, write_json
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    from canopy.chips.plan import Shard

SYNTH_SITE = "procedural forest"
_SYNTH_FORMAT = 1  # raise it when the same seeds would give other chips
_PER_SHARD = 64
_EDGES_M = (0, 2, 5, 10, 15, 20, 25, 30, 35, 200)
_SAMPLES = 24
_NO_LABEL = "#c9c9c9"


def write_chips(
    manifest: str | Path,
    folder: str | Path,
    options: CutOptions | None = None,
    splits: SplitOptions | None = None,
    *,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Cut the pairs of a manifest into a folder of shards.

    `folder` gets shards/*.safetensors (see `canopy.chips.store`), index.csv and index.parquet, summary.json
    and contact_sheet.png. Running again cuts only what is missing: after a kill, or after rows were added to
    the manifest.

    Args:
        manifest: see `plan.read_pairs`.
        folder: created where it is not there.
        options, splits: how to cut and to split.
        limit: only the manifest's first rows.
        workers: processes.
        overwrite: replace what was cut with other options.
        progress: told about shards.

    Returns:
        summary.json's object, with `cut_now` (shards cut by this call).

    Raises:
        InputError: bad settings or inputs, or the folder holds chips of other settings; nothing is written.
        OutputError: the folder cannot be written.
    """
    from canopy.chips.cut import UNREADABLE
    from canopy.chips.plan import FORMAT, plan_shards, read_pairs

    options, splits, progress = options or CutOptions(), splits or SplitOptions(), progress or NoProgress()
    folder = Path(folder)
    if workers < 1 or (limit is not None and limit < 1):
        raise InputError("workers and limit must be at least 1")
    settings = {"format": FORMAT, "rules": options.model_dump(), "splits": splits.model_dump()}
    check_folder(folder, settings, overwrite)
    shards = plan_shards(read_pairs(manifest, limit), options, splits)
    begin_folder(folder, settings)
    progress.start(len(shards), "cutting shards")
    cut_now = 0
    for done in _cut_all(shards, folder, workers):
        cut_now += done
        progress.advance()
    # Distances are the plan's: a longer manifest may have added test chips beside what was cut before.
    distance = {chip.id: round(chip.test_distance_m, 2) for shard in shards for chip in shard.chips}
    rows = [
        replace(row, test_distance_m=distance[row.id])
        for shard in shards
        for row in read_rows(shard.path(folder)) or []
    ]
    if overwrite:
        for path in {*(folder / SHARDS).glob("*.*")} - {shard.path(folder) for shard in shards}:
            path.unlink(missing_ok=True)
    write_index(folder, rows)
    near = [r for r in rows if not r.reason and r.split == "train" and r.test_distance_m <= splits.buffer_m]
    summary = summarise(rows) | {
        "train_chips_within_buffer_of_test": len(near),
        "buffer_m": splits.buffer_m,
        "shards": len(shards),  # those all of whose chips were rejected hold their rows alone
        "settings": settings,
    }
    if "train" in summary["by_split"] and "val" not in summary["by_split"]:
        log.warning(
            "note: no val chips: training on these will not be validated; give rows `val` in the manifest's "
            "column `split`, or leave the column out and choose a larger --val or a smaller --block-m"
        )
    write_json(folder / "summary.json", summary)
    draw_contact_sheet(folder, rows)
    return summary | {"cut_now": cut_now, "unreadable": sum(r.reason.startswith(UNREADABLE) for r in rows)}


def _cut_all(shards: list[Shard], folder: Path, workers: int) -> Iterator[bool]:
    from canopy.chips.cut import cut_shard

    if workers == 1 or len(shards) < 2:
        yield from (cut_shard(shard, folder) for shard in shards)
        return
    from multiprocessing import get_context

    # GDAL and forked processes do not go together.
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(cut_shard, shard, folder) for shard in shards]):
            yield job.result()


def check_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """See that chips of `settings` may be written to a folder. Raises InputError, DataError."""
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", where=folder, expected="a folder")
    known = folder / SETTINGS
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


def begin_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create a chips folder, note its settings, and clear away what a killed run has left half-written."""
    with told_as_output(folder):
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
        for leftover in folder.glob("**/.*.part"):
            leftover.unlink(missing_ok=True)


# ---- chips that need no cutting -----------------------------------------------------------------------
def write_folder(folder: Path, chips: Iterable[Chip], licence: str = "") -> list[ChipRow]:
    """Write chips, each with a unique id, as `canopy data chips` would have left them; the index's rows."""
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    rows: list[ChipRow] = []
    every = iter(chips)
    while members := list(islice(every, _PER_SHARD)):
        name = f"{SHARDS}/{len(rows) // _PER_SHARD:04d}.safetensors"
        members = [described(chip, shard=name, licence=licence or chip.row.licence) for chip in members]
        write_shard(folder / name, members)
        rows += [chip.row for chip in members]
    write_index(folder, rows)
    return rows


def synth_chips(count: int, side_px: int = 512, first_seed: int = 1000) -> Iterator[Chip]:
    """Training chips of the procedural forest, each another place, sun and camera; heights are cell maxima.

    Seeds start far from 0, the demo's, so that the demo scene is new to a model trained on these.
    """
    from canopy.synth.forest import random_spec
    from canopy.synth.render import render

    half = side_px // 2
    for seed in range(first_seed, first_seed + count):
        tile = render(random_spec(seed), 0.0, 0.0, side_px, side_px)
        chm = tile.chm.reshape(half, 2, half, 2).max(axis=(1, 3)).astype(np.float32)
        yield Chip(ChipRow(f"synth_{seed}", SYNTH_SITE, "synth", "train"), np.maximum(tile.rgb, 1), chm)


def write_synth(
    folder: str | Path,
    count: int,
    side_px: int = 512,
    first_seed: int = 1000,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A chips folder of the procedural forest, to train on beside real chips: `data.chips=[chips,synth]`.

    A folder that holds these very chips is left as it is.

    Returns:
        chips, folder's settings, and `cut_now`, whether they were made by this call.

    Raises:
        InputError: bad numbers, or the folder holds something else.
        OutputError: it cannot be written.
    """
    folder, progress = Path(folder), progress or NoProgress()
    if count < 1 or side_px < 32 or side_px % 2:
        raise InputError(f"{count} chips of {side_px} px", expected="at least 1, of an even number >= 32")
    drawn = {"count": count, "size_px": side_px, "first_seed": first_seed}
    settings = {"format": _SYNTH_FORMAT, "synth": drawn}
    check_folder(folder, settings, overwrite)
    known = folder / SETTINGS
    same = known.is_file() and json.loads(known.read_text()) == settings
    if same and (folder / INDEX_CSV).is_file():
        return {"chips": count, "settings": settings, "cut_now": False}
    for old in [folder / INDEX_CSV, *folder.glob(f"{SHARDS}/*")]:
        old.unlink(missing_ok=True)
    begin_folder(folder, settings)
    progress.start(count, "drawing the procedural forest")

    def told() -> Iterator[Chip]:
        for chip in synth_chips(count, side_px, first_seed):
            yield chip
            progress.advance()

    write_folder(folder, told(), "Apache-2.0")
    return {"chips": count, "settings": settings, "cut_now": True}


# ---- what there is ----------------------------------------------------------------------------------------
def summarise(rows: Sequence[ChipRow]) -> dict[str, Any]:
    """Counts by split, site, reason and height, and the shifts measured at each site."""
    kept = [row for row in rows if not row.reason]
    # Reasons may end in a file's own message; the kind is what is counted.
    reasons = Counter(row.reason.split(":")[0] for row in rows if row.reason)
    return {
        "chips": len(kept),
        "rejected": sum(reasons.values()),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "by_split": {
            split: {
                "chips": len(part),
                "sites": len({row.site for row in part}),
                "hectares": round(sum(r.height_px * r.width_px * r.gsd_m**2 for r in part) / 1e4, 2),
                "gedi_shots": sum(row.shots for row in part),
                "by_height_p95_m": _by_height(part),
                "nearest_test_m": _of_known(np.min, [row.test_distance_m for row in part]),
            }
            for split in sorted({row.split for row in kept})
            if (part := [row for row in kept if row.split == split])
        },
        "by_site": {site: _site(site, rows) for site in sorted({row.site for row in rows})},
    }


def _site(site: str, rows: Sequence[ChipRow]) -> dict[str, Any]:
    here = [row for row in rows if row.site == site]
    kept = [row for row in here if not row.reason]
    # One measurement serves all chips of a shard: count it once.
    shifts = {(r.pair, r.shift_down_m, r.shift_right_m): r for r in here if r.shift_sure}.values()
    median = partial(_of_known, np.median)
    return {
        "chips": dict(sorted(Counter(row.split for row in kept).items())),
        "rejected": len(here) - len(kept),
        "height_p95_m": median([row.height_p95_m for row in kept]),
        "shifts_measured": len(shifts),
        "shift_down_m": median([row.shift_down_m for row in shifts]),
        "shift_right_m": median([row.shift_right_m for row in shifts]),
        "shift_length_m": median([float(np.hypot(r.shift_down_m, r.shift_right_m)) for r in shifts]),
    }


def _by_height(rows: Sequence[ChipRow]) -> dict[str, int]:
    counts, _ = np.histogram([row.height_p95_m for row in rows], _EDGES_M)
    names = [f"{a}-{b}" for a, b in pairwise(_EDGES_M[:-1])] + [f"over {_EDGES_M[-2]}"]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _of_known(statistic: Any, values: Sequence[float]) -> float | None:
    known = [v for v in values if np.isfinite(v)]
    return round(float(statistic(known)), 2) if known else None


def table(summary: dict[str, Any]) -> str:
    """The summary as a few lines of text."""
    lines = [f"{summary['chips']} chips, {summary['rejected']} rejected"]
    for split, facts in summary["by_split"].items():
        near = facts["nearest_test_m"]
        beside = f", nearest test chip at {near:.0f} m" if near is not None else ""
        heights = ", ".join(f"{name} m: {n}" for name, n in facts["by_height_p95_m"].items() if n)
        lines.append(
            f"  {split:<10}{facts['chips']:>6} chips {facts['hectares']:>9.1f} ha {facts['sites']:>4} sites"
            f"  [{heights}]{beside}"
        )
    lines += [f"  rejected {n:>6}: {reason}" for reason, n in summary["rejected_by_reason"].items()]
    for site, facts in summary["by_site"].items():
        if facts["shifts_measured"]:
            lines.append(
                f"  {site}: labels {facts['shift_length_m']:.1f} m off, median of {facts['shifts_measured']}"
                f" ({facts['shift_down_m']:+.1f} south, {facts['shift_right_m']:+.1f} east)"
            )
    return "\n".join(lines)


def draw_contact_sheet(folder: Path, rows: Sequence[ChipRow]) -> None:
    """`folder/contact_sheet.png`: image and heights of chips spread evenly over splits and sites."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kept = sorted((row for row in rows if not row.reason), key=lambda row: (row.split, row.site))
    if not kept:
        return
    chosen = kept[:: -(-len(kept) // _SAMPLES)]
    across = min(4, len(chosen))
    down = -(-len(chosen) // across)
    figure = Figure(figsize=(4.2 * across, 2.45 * down + 0.5), layout="constrained")
    axes = figure.subplots(down, 2 * across, squeeze=False)
    colours = colormaps["viridis"].with_extremes(bad=_NO_LABEL)
    shards = ChipShards(folder).subset(chosen)
    top = float(np.nanmax([5.0, *(row.height_p95_m for row in chosen)]))
    for cell in axes.flat:
        cell.set_axis_off()
    for i, chip in enumerate(shards):
        row = chip.row
        left, right = axes[i // across, 2 * (i % across) : 2 * (i % across) + 2]
        left.imshow(np.moveaxis(chip.rgb, 0, 2), interpolation="nearest")
        picture = right.imshow(chip.chm_m, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
        left.set_title(f"{row.pair} ({row.split})", fontsize=6, loc="left")
        right.set_title(f"p95 {row.height_p95_m:.0f} m  w {row.weight:.2f}", fontsize=6, loc="left")
    figure.colorbar(picture, ax=axes, shrink=0.5, label="canopy height (m)", extend="max")
    with replacing(folder / "contact_sheet.png") as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})
