"""`canopy data chips`: plan, cut what is not there yet, and say what there is.

What there is: counts and shifts by split and site (summary.json), and a sheet of samples to look at.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.cut import UNREADABLE, cut_shard, read_rows
from canopy.chips.index import SHARDS, ChipRow, begin_folder, check_folder, cut_rows, write_index
from canopy.chips.plan import FORMAT, CutRules, Shard, plan_shards, read_pairs
from canopy.chips.splits import Place, SplitRules, drop_near_test
from canopy.chips.store import ChipShards
from canopy.errors import InputError, OutputError
from canopy.files import replacing
from canopy.runtime import NoProgress, Progress

_EDGES_M = (0, 2, 5, 10, 15, 20, 25, 30, 35, 200)
_SAMPLES = 24
_NO_LABEL = "#c9c9c9"


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

    `folder` gets shards/*.safetensors (see `canopy.chips.store`), index.csv and index.parquet, summary.json
    and contact_sheet.png. Running again cuts only what is missing: after a kill, or after rows were added to
    the manifest. Two runs of equal inputs give equal shards, byte for byte, however often they were
    interrupted.

    Args:
        manifest: see `plan.read_pairs`.
        folder: created where it is not there.
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
    check_folder(folder, settings, overwrite)
    shards = plan_shards(read_pairs(manifest, limit), rules, splits)
    begin_folder(folder, settings)
    progress.start(len(shards), "cutting shards")
    done = []
    for cut_now in _cut_all(shards, folder, workers):
        done.append(cut_now)
        progress.advance()
    rows = _collect(shards, folder)
    if overwrite:
        _remove_others({shard.name for shard in shards}, folder)
    write_index(folder, rows)
    # Counted again on what was written, not on what was planned. Test chips that were rejected count too.
    kept = [r for r in rows if not r.reason or r.split.startswith("test")]
    places = [Place(r.site, r.crs, (r.west, r.south, r.east, r.north), r.split) for r in kept]
    summary = summarise(rows) | {
        "train_chips_within_buffer_of_test": sum(map(bool, drop_near_test(places, splits.buffer_m))),
        "buffer_m": splits.buffer_m,
        "shards": len(shards),  # those all of whose chips were rejected hold an index alone
        "settings": settings,
    }
    with replacing(folder / "summary.json") as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    draw_contact_sheet(folder, rows)
    return summary | {"cut_now": sum(done), "unreadable": sum(r.reason.startswith(UNREADABLE) for r in rows)}


def _cut_all(shards: list[Shard], folder: Path, workers: int) -> Iterator[bool]:
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            yield cut_shard(shard, folder)
        return
    from multiprocessing import get_context

    # GDAL and forked processes do not go together.
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(cut_shard, shard, folder) for shard in shards]):
            yield job.result()


def _collect(shards: list[Shard], folder: Path) -> list[ChipRow]:
    rows: list[ChipRow] = []
    for shard in shards:
        found = read_rows(shard, folder)
        if found is None:
            raise OutputError(
                "a shard was written and cannot be read back", where=folder / SHARDS / shard.name
            )
        rows += found
    return rows


def _remove_others(ours: set[str], folder: Path) -> None:
    for path in (folder / SHARDS).glob("*"):
        if path.suffix in (".json", ".safetensors") and path.stem not in ours:
            path.unlink(missing_ok=True)


# ---- what there is ----------------------------------------------------------------------------------------
def summarise(rows: Sequence[ChipRow]) -> dict[str, Any]:
    """Counts by split, site, reason and height, and the shifts measured at each site."""
    kept = cut_rows(rows)
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
                "hectares": round(sum(_hectares(row) for row in part), 2),
                "gedi_shots": sum(row.shots for row in part),
                "by_height_p95_m": _by_height(part),
                "nearest_test_m": _least([row.test_distance_m for row in part]),
            }
            for split in sorted({row.split for row in kept})
            if (part := [row for row in kept if row.split == split])
        },
        "by_site": {site: _site(site, rows) for site in sorted({row.site for row in rows})},
    }


def split_note(summary: dict[str, Any]) -> str | None:
    """What somebody should know who is about to train on these chips: that nothing would be validated."""
    splits = summary["by_split"]
    if "train" not in splits or "val" in splits:
        return None
    return (
        "no val chips: training on these will not be validated; give the manifest a column `split`, or "
        "choose a larger --val or a smaller --block-m"
    )


def _site(site: str, rows: Sequence[ChipRow]) -> dict[str, Any]:
    here = [row for row in rows if row.site == site]
    kept = cut_rows(here)
    # One measurement serves all chips of a block: count it once.
    shifts = {(r.pair, r.shift_down_m, r.shift_right_m): r for r in here if r.shift_sure}.values()
    return {
        "chips": dict(sorted(Counter(row.split for row in kept).items())),
        "rejected": len(here) - len(kept),
        "height_p95_m": _median([row.height_p95_m for row in kept]),
        "shifts_measured": len(shifts),
        "shift_down_m": _median([row.shift_down_m for row in shifts]),
        "shift_right_m": _median([row.shift_right_m for row in shifts]),
        "shift_length_m": _median([float(np.hypot(r.shift_down_m, r.shift_right_m)) for r in shifts]),
    }


def _hectares(row: ChipRow) -> float:
    return row.height_px * row.width_px * row.gsd_m**2 / 1e4


def _by_height(rows: Sequence[ChipRow]) -> dict[str, int]:
    counts, _ = np.histogram([row.height_p95_m for row in rows], _EDGES_M)
    names = [f"{a}-{b}" for a, b in pairwise(_EDGES_M[:-1])] + [f"over {_EDGES_M[-2]}"]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _median(values: Sequence[float]) -> float | None:
    known = [v for v in values if np.isfinite(v)]
    return round(float(np.median(known)), 2) if known else None


def _least(values: Sequence[float]) -> float | None:
    known = [v for v in values if np.isfinite(v)]
    return round(min(known), 2) if known else None


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
    """`folder/contact_sheet.png`: image and heights of chips drawn evenly from all sites and splits."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = _spread(cut_rows(rows))
    if not chosen:
        return
    across = min(4, len(chosen))
    down = -(-len(chosen) // across)
    figure = Figure(figsize=(4.2 * across, 2.45 * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(down, 2 * across, squeeze=False))
    colours = colormaps["viridis"].with_extremes(bad=_NO_LABEL)
    shards = ChipShards(folder).subset(chosen)
    top = float(np.nanmax([5.0, *(row.height_p95_m for row in chosen)]))
    for cell in axes.flat:
        cell.set_axis_off()
    for i, row in enumerate(chosen):
        chip = shards[i]
        left, right = axes[i // across, 2 * (i % across) : 2 * (i % across) + 2]
        left.imshow(np.moveaxis(chip.rgb, 0, 2), interpolation="nearest")
        picture = right.imshow(chip.chm_m, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
        left.set_title(f"{row.pair} ({row.split})", fontsize=6, loc="left")
        right.set_title(f"p95 {row.height_p95_m:.0f} m  w {row.weight:.2f}", fontsize=6, loc="left")
    figure.colorbar(picture, ax=axes, shrink=0.5, label="canopy height (m)", extend="max")
    with replacing(folder / "contact_sheet.png") as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})


def _spread(rows: Sequence[ChipRow]) -> list[ChipRow]:
    """Up to 24 chips, site by site and split by split in turn."""
    groups: dict[tuple[str, str], list[ChipRow]] = {}
    for row in rows:
        groups.setdefault((row.split, row.site), []).append(row)
    # Within a group every n-th, so that several pictures of one site are not neighbours.
    each = -(-_SAMPLES // max(len(groups), 1))
    queues = [members[:: max(1, len(members) // each)] for members in groups.values()]
    out: list[ChipRow] = []
    for turn in range(max((len(q) for q in queues), default=0)):
        out += [queue[turn] for queue in queues if turn < len(queue)]
    return out[:_SAMPLES]
