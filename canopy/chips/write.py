"""A data pack's pairs as they are, whole and not registered; `canopy data chips` is what training uses.

Is this pair fit to learn from? Simple evidence, a reason for every no, and the numbers kept.

The thresholds are meant to drop what is plainly wrong; they are no judge of quality.

Cut one shard: read, register, screen, and write its chips. A pure function of the plan's shard.

What a chips folder holds: tables for people and machines, and a sheet of samples to look at.

`canopy data chips`: plan, cut what is not there yet, and say what there is.

Chips that need no cutting: those in memory, and those of the procedural forest, as a chips folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from canopy.chips.plan import (
    FORMAT,
    LABEL_FACTOR,
    Block,
    CutRules,
    Place,
    PlannedChip,
    Shard,
    SplitRules,
    count_near_test,
    plan_shards,
    read_pairs,
)
from canopy.chips.register import Shift, image_shift
from canopy.chips.store import (
    INDEX_CSV,
    LABEL_GSD_M,
    NO_HEIGHT,
    NO_SHOTS,
    Chip,
    ChipRow,
    IndexRow,
    as_texts,
    cut_rows,
    row_of,
    row_of_chip,
    write_index,
    write_shard,
    write_store,
)
from canopy.chips.targets import Target, chm_target, gap_weight, shots_on, unknown_target
from canopy.errors import DataError, FetchError, ImageryError, InputError, OutputError
from canopy.files import file_sha256, replacing, told_as_output
from canopy.geo.grid import Grid
from canopy.imagery.base import Imagery
from canopy.imagery.open import open_imagery
from canopy.runtime import NoProgress, Progress

_COLUMNS = ("id", "kind", "site", "rgb_path", "chm_path", "rgb_res_m", "chm_res_m", "split")
_DARK = 6  # JPEG leaves values up to about this inside areas that were 0,0,0
_SMALLEST_GAP_PX = 64  # smaller dark spots are shadows, not missing image


def cut_pack(pack: str | Path, splits: tuple[str, ...] | None = None) -> tuple[list[Chip], str]:
    """Read every pair of `pack/manifest.csv`.

    Args:
        pack: folder with manifest.csv; images at 0.5 m or finer, heights at 1 m in uint16 centimetres.
        splits: keep only these; None keeps all.

    Returns:
        The chips, and a sha256 over the manifest and all files it names.

    Raises:
        DataError: missing manifest, columns or files, heights of other than 1 m, or pairs whose sizes do not
            match.
    """
    pack = Path(pack)
    manifest = pack / "manifest.csv"
    if not manifest.is_file():
        raise DataError("no manifest.csv", where=pack, expected="the folder of a data pack")
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [c for c in _COLUMNS if not rows or c not in rows[0]]
    if missing:
        raise DataError(f"lacks the columns {', '.join(missing)}", where=manifest)
    digest = hashlib.sha256(manifest.read_bytes())
    chips = []
    for row in rows:
        if splits is None or row["split"] in splits:
            for column in ("rgb_path", "chm_path"):
                digest.update((pack / row[column]).read_bytes())
            chips.append(_read_pair(pack, row))
    return chips, digest.hexdigest()


def _read_pair(pack: Path, row: dict[str, str]) -> Chip:
    import rasterio
    from rasterio.enums import Resampling

    if _number(row["chm_res_m"]) != LABEL_GSD_M:
        raise DataError(
            f"chm_res_m is {row['chm_res_m'] or 'missing'}", where=row["id"], expected=f"{LABEL_GSD_M:g}",
            remedy="cut chips with canopy data chips --manifest",
        )  # fmt: skip
    with rasterio.open(pack / row["chm_path"]) as file:
        cm = file.read(1)
    height, width = cm.shape
    shape = (3, 2 * height, 2 * width)
    with rasterio.open(pack / row["rgb_path"]) as file:
        factor = file.height / shape[1]
        if file.count != 3 or factor < 1 or abs(file.width / shape[2] - factor) > 1e-6:
            raise DataError(
                f"image of {file.count} x {file.height} x {file.width} for heights of {height} x {width}",
                where=row["rgb_path"],
                expected="three bands on twice the height grid, or finer",
            )
        # Averaging 0.1 m pixels to 0.5 m is what a coarser camera would have seen.
        rgb = file.read(out_shape=shape, resampling=Resampling.average)
    kind = "neon" if row["kind"] == "neon" else "lidar"
    chm = np.where(cm == NO_HEIGHT, np.nan, cm / 100.0).astype(np.float32)
    return Chip(ChipRow(row["id"], row["site"], kind, row["split"]), mark_missing(rgb), chm)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def mark_missing(rgb: np.ndarray) -> np.ndarray:
    """Set missing image to exactly 0,0,0 and lift dark but real pixels off it; uint8 (3, H, W)."""
    dark = rgb.max(axis=0) <= _DARK
    labels, count = ndimage.label(dark)
    if count:
        areas = np.bincount(labels.ravel())
        touches_gap = areas >= _SMALLEST_GAP_PX
        touches_gap[0] = False
        missing = touches_gap[labels]
    else:
        missing = dark
    out = np.maximum(rgb, 1)
    out[:, missing] = 0
    return out


NO_LABEL = "no label"


@dataclass(frozen=True)
class ScreenRules:
    """When to reject. Shares are of the chip's pixels.

    Attributes:
        least_image: share that has an image.
        least_label: share of the label pixels that are known.
        most_cloud: share that is white, bright and smooth.
        least_contrast: standard deviation of brightness (0..1) below which a bright image is haze.
        least_sharpness: finest detail relative to the next coarser. Sharp aerial images have 0.6 to 0.8, one
            blown up twice 0.37, four times 0.31; nothing falls below 0.24.
        least_match: share of the heights' variance that colour and texture explain, where heights vary.
    """

    least_image: float = 0.5
    least_label: float = 0.05
    most_cloud: float = 0.3
    least_contrast: float = 0.035
    least_sharpness: float = 0.33
    least_match: float = 0.02


@dataclass(frozen=True)
class Screening:
    """What was found. `reason` is '' where the chip may stay; numbers are NaN where they mean nothing."""

    reason: str
    image_share: float
    label_share: float
    cloud_share: float
    contrast: float
    sharpness: float
    match: float


def screen(
    rgb: np.ndarray,
    image_valid: np.ndarray,
    height_m: np.ndarray,
    label_valid: np.ndarray,
    gsd_m: float = 0.5,
    rules: ScreenRules | None = None,
) -> Screening:
    """Judge one chip.

    Args:
        rgb: float (3, H, W) in 0..1.
        image_valid: bool (H, W).
        height_m, label_valid: (h, w) on the same ground, H / h and W / w the same whole number.
        gsd_m: of the image.
        rules: thresholds.

    Returns:
        The first reason that applies, in the order: no image, no label, cloud, haze, blur, mismatch.
    """
    rules = rules or ScreenRules()
    image_share, label_share = float(image_valid.mean()), float(label_valid.mean())
    grey = rgb.mean(axis=0, dtype=np.float32)
    cloud = cloud_share(rgb, image_valid, gsd_m)
    contrast = float(grey[image_valid].std()) if image_share else np.nan
    sharp = sharpness(grey, image_valid)
    match = label_match(rgb, image_valid, height_m, label_valid, gsd_m)
    bright = float(grey[image_valid].mean()) if image_share else np.nan
    checks = [
        ("no image", image_share < rules.least_image),
        (NO_LABEL, label_share < rules.least_label),
        ("cloud", cloud > rules.most_cloud),
        ("haze", bright > 0.5 and contrast < rules.least_contrast),
        ("blur", sharp < rules.least_sharpness),
        ("image and label do not match", match < rules.least_match),
    ]
    reason = next((name for name, applies in checks if applies), "")
    return Screening(reason, image_share, label_share, cloud, contrast, sharp, match)


def cloud_share(rgb: np.ndarray, valid: np.ndarray, gsd_m: float) -> float:
    """Share of the known pixels that are white and bright over 5 m, and without texture there."""
    if not valid.any():
        return np.nan
    size = max(3, round(5 / gsd_m))
    mean = ndimage.uniform_filter(rgb.astype(np.float32), (0, size, size))
    grey = rgb.mean(axis=0, dtype=np.float32)
    rough = np.sqrt(np.maximum(ndimage.uniform_filter(grey**2, size) - mean.mean(axis=0) ** 2, 0))
    white = (mean.min(axis=0) > 0.72) & (mean.max(axis=0) - mean.min(axis=0) < 0.09) & (rough < 0.05)
    return float((white & valid).sum() / valid.sum())


def sharpness(grey: np.ndarray, valid: np.ndarray) -> float:
    """Detail of one pixel relative to detail of two: low for an image blown up or out of focus.

    NaN where there is too little detail of either kind to judge (water, bare fields).
    """
    inner = ndimage.binary_erosion(valid, iterations=6)
    if inner.sum() < 400:
        return np.nan
    once = ndimage.gaussian_filter(grey, 0.7)
    twice = ndimage.gaussian_filter(grey, 1.6)
    fine, coarse = (grey - once)[inner].std(), (once - twice)[inner].std()
    return float(fine / coarse) if coarse > 0.004 else np.nan


def label_match(
    rgb: np.ndarray, image_valid: np.ndarray, height_m: np.ndarray, label_valid: np.ndarray, gsd_m: float
) -> float:
    """Share of the variance of heights, over 8 m blocks, that greenness, brightness and texture explain.

    A least-squares fit within the chip, adjusted for its number of terms; NaN where heights hardly vary or
    fewer than 40 blocks are known, for then it says nothing.
    """
    factor = rgb.shape[1] // height_m.shape[0]
    block = max(1, round(8 / gsd_m / factor))
    grey = rgb.mean(axis=0, dtype=np.float32)
    rough = np.abs(grey - ndimage.gaussian_filter(grey, 2.0))
    green = (2 * rgb[1] - rgb[0] - rgb[2]) / (rgb.sum(axis=0) + 0.05)
    known = ndimage.minimum_filter(image_valid, 3)
    features = [_blocks(x, block * factor) for x in (grey, rough, green)]
    labels = _blocks(label_valid.astype(np.float32), block)
    use = (labels > 0.6) & (_blocks(known.astype(np.float32), block * factor) > 0.9)
    heights = _blocks(np.where(label_valid, height_m, 0), block)[use] / labels[use]
    if use.sum() < 40 or heights.std() < 2.5:
        return np.nan
    terms = np.stack([np.ones(len(heights)), *(f[use] for f in features)], axis=1).astype(np.float64)
    rest = heights - terms @ np.linalg.lstsq(terms, heights, rcond=None)[0]
    free = len(heights) - terms.shape[1]
    return float(1 - rest.var() / heights.var() * (len(heights) - 1) / free)


def _blocks(x: np.ndarray, n: int) -> np.ndarray:
    """Means over n x n pixels; a rest at the edges is left out."""
    h, w = (size // n * n for size in x.shape)
    return x[:h, :w].reshape(h // n, n, w // n, n).mean(axis=(1, 3))


SHARDS = "shards"
DISPLACED = "image and label lie too far apart"
UNREADABLE = "unreadable"
_LEAST_SHIFT_M = 0.5  # half a label pixel: below it, moving changes nothing


def cut_shard(shard: Shard, folder: Path) -> bool:
    """Write `folder/shards/NAME.safetensors` (none where every chip was rejected) and NAME.json, its rows.

    A shard whose two files are complete is left as it is. Each file is written under a temporary name,
    the rows last: a run that is killed leaves whole shards, and the next run makes the missing ones.

    Returns:
        Whether it was cut now.

    Raises:
        OutputError: a file cannot be written.
    """
    if read_rows(shard, folder) is not None:
        return False
    chips: list[tuple[Chip, np.ndarray]] = []
    rows: list[IndexRow] = []
    for block in shard.blocks:
        for chip, shots, row in _cut_block(block, shard.rules):
            if chip is not None:
                chips.append((chip, shots))
                row = replace(row, shard=f"{SHARDS}/{shard.name}.safetensors")
            rows.append(row)
    path = folder / SHARDS / f"{shard.name}.safetensors"
    sha256 = ""
    if chips:
        write_shard(path, chips, shard.key)
        sha256 = file_sha256(path)
    with replacing(path.with_suffix(".json")) as part:
        record = {"key": shard.key, "sha256": sha256, "rows": [as_texts(row) for row in rows]}
        part.write_text(json.dumps(record, indent=0) + "\n")
    return True


def read_rows(shard: Shard, folder: Path) -> list[IndexRow] | None:
    """Rows of a shard that is complete and undamaged, else None."""
    path = folder / SHARDS / f"{shard.name}.json"
    try:
        record = json.loads(path.read_text())
        data = path.with_suffix(".safetensors")
        if record["key"] != shard.key or (record["sha256"] and file_sha256(data) != record["sha256"]):
            return None
        return [row_of(values, path) for values in record["rows"]]
    except (OSError, ValueError, KeyError):
        return None


# ---- one block --------------------------------------------------------------------------------------
def _cut_block(block: Block, rules: CutRules) -> Iterator[tuple[Chip | None, np.ndarray, IndexRow]]:
    """Chip (None where rejected), its shots and its row, for every chip of the block."""
    wanted = [chip for chip in block.chips if not chip.reason]
    for chip in block.chips:
        if chip.reason:
            yield None, NO_SHOTS, _row(block, chip, reason=chip.reason)
    if not wanted:
        return
    try:
        frame = _frame(block.chips)
        grid = block.grid.window(*frame)
        image, target, shift, moved = _read(block, grid, rules)
        labels = _label_grid(grid)
        shots = shots_on(block.pair.gedi, labels, rh=rules.rh) if block.pair.gedi else NO_SHOTS
    except FetchError:
        raise
    except (ImageryError, DataError) as error:
        for chip in wanted:
            yield None, NO_SHOTS, _row(block, chip, reason=f"{UNREADABLE}: {error.what}")
        return
    too_far = shift is not None and shift.is_sure and shift.length_m > rules.most_shift_m
    for chip in wanted:
        part, near, row = _cut_chip(block, chip, frame, image, target, shots)
        if shift is not None:
            row = replace(
                row, shift_down_m=round(shift.down_m, 3), shift_right_m=round(shift.right_m, 3),
                shift_sure=shift.is_sure, shift_applied=moved,
            )  # fmt: skip
        if too_far and not row.reason:
            row = replace(row, reason=DISPLACED)
        yield (None if row.reason else part), near, row


def _frame(chips: Sequence[PlannedChip]) -> tuple[int, int, int, int]:
    """The window (row, col, height, width) around all chips of a block, those of other splits left out."""
    top, left = (min(chip.window[k] for chip in chips) for k in (0, 1))
    bottom, right = (max(chip.window[k] + chip.window[k + 2] for chip in chips) for k in (0, 1))
    return top, left, bottom - top, right - left


def _label_grid(grid: Grid) -> Grid:
    px, py = grid.pixel
    (x, y), shape = grid.xy(0, 0), (grid.height // LABEL_FACTOR, grid.width // LABEL_FACTOR)
    return Grid.of(grid.crs, (px * LABEL_FACTOR, 0, x, 0, -py * LABEL_FACTOR, y), shape)


def _read(block: Block, grid: Grid, rules: CutRules) -> tuple[Imagery, Target, Shift | None, bool]:
    """Image and target of the block, the measured shift, and whether it was undone in the target."""
    pair, labels = block.pair, _label_grid(grid)
    image = open_imagery(pair.rgb, crs=pair.crs or None).read(grid)
    if not pair.chm:
        return image, unknown_target(labels.shape), None, False

    def label(moved_m: tuple[float, float]) -> Target:
        return chm_target(
            pair.chm, labels, rule=rules.rule, gap_years=pair.gap_years, floor_m=pair.floor_m, moved_m=moved_m
        )

    target = label((0.0, 0.0))
    if not rules.register or rules.gsd_m > 1.0:
        return image, target, None, False
    fine = (target.height_m, target.valid)
    heights, known = (x.repeat(LABEL_FACTOR, 0).repeat(LABEL_FACTOR, 1) for x in fine)
    present = image.valid & (image.rgb.max(axis=0) > 0.03)
    shift = image_shift(image.rgb, heights, known & present, grid.gsd_m)
    if shift is None or not shift.is_sure or not _LEAST_SHIFT_M <= shift.length_m <= rules.most_shift_m:
        return image, target, shift, False
    return image, label((shift.down_m, shift.right_m)), shift, True


def _cut_chip(
    block: Block,
    chip: PlannedChip,
    frame: tuple[int, int, int, int],
    image: Imagery,
    target: Target,
    shots: np.ndarray,
) -> tuple[Chip, np.ndarray, IndexRow]:
    top, left = chip.window[0] - frame[0], chip.window[1] - frame[1]
    height, width = chip.window[2:]
    here = np.s_[top : top + height, left : left + width]
    n = LABEL_FACTOR
    below = np.s_[top // n : (top + height) // n, left // n : (left + width) // n]
    pixels = np.round(image.rgb[:, *here] * 255).astype(np.uint8)
    pixels[:, ~image.valid[here]] = 0
    pixels = mark_missing(pixels)
    heights, known = target.height_m[below], target.valid[below]
    seen = pixels.max(axis=0) > 0
    pair = block.pair
    screening = ScreenRules() if pair.chm else ScreenRules(least_label=0.0)
    found = screen(pixels / np.float32(255), seen, heights, known, block.grid.gsd_m, screening)
    metres = np.where(known, heights, np.nan).astype(np.float32)
    cut = Chip(ChipRow(chip.id, pair.site, pair.kind, chip.place.split), pixels, metres)
    near = shots - np.array([top // n, left // n, 0, 0], np.float32)
    inside = ((near[:, :2] >= 0) & (near[:, :2] < [height // n, width // n])).all(axis=1)
    # GEDI shots alone are labels too, if weak ones.
    reason = "" if found.reason == NO_LABEL and inside.any() else found.reason
    evidence = {k: round(v, 4) for k, v in asdict(found).items() if k != "reason"}
    row = _row(block, chip, reason, shots=int(inside.sum()), **evidence, **_heights(heights[known]))
    return cut, near[inside], row


def _heights(known: np.ndarray) -> dict[str, float]:
    if not known.size:
        return {}
    return {
        "height_mean_m": round(float(known.mean()), 3),
        "height_p95_m": round(float(np.percentile(known, 95)), 3),
        "height_max_m": round(float(known.max()), 3),
        "cover": round(float((known > 2).mean()), 4),
    }


def _row(block: Block, chip: PlannedChip, reason: str = "", **facts: float) -> IndexRow:
    pair, grid = block.pair, block.grid
    west, south, east, north = (round(v, 6) for v in chip.place.bounds)
    row, col, height, width = chip.window
    gsd = round(grid.gsd_m, 4)
    return IndexRow(
        id=chip.id, pair=pair.id, site=pair.site, kind=pair.kind, split=chip.place.split, reason=reason,
        row=row, col=col, height_px=height, width_px=width, gsd_m=gsd, label_gsd_m=gsd * LABEL_FACTOR,
        crs=str(chip.place.crs), west=west, south=south, east=east, north=north,
        weight=round(gap_weight(pair.gap_years), 4), floor_m=pair.floor_m,
        test_distance_m=round(chip.test_distance_m, 2), licence=pair.licence, **facts,  # type: ignore[arg-type]
    )  # fmt: skip


_EDGES_M = (0, 2, 5, 10, 15, 20, 25, 30, 35, 200)
_SAMPLES = 24
_NO_LABEL = "#c9c9c9"


def summarise(rows: Sequence[IndexRow]) -> dict[str, Any]:
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
                "nearest_test_m": _least(row.test_distance_m for row in part),
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


def _site(site: str, rows: Sequence[IndexRow]) -> dict[str, Any]:
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


def _hectares(row: IndexRow) -> float:
    return row.height_px * row.width_px * row.gsd_m**2 / 1e4


def _by_height(rows: Sequence[IndexRow]) -> dict[str, int]:
    counts, _ = np.histogram([row.height_p95_m for row in rows], _EDGES_M)
    names = [f"{a}-{b}" for a, b in pairwise(_EDGES_M[:-1])] + [f"over {_EDGES_M[-2]}"]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _median(values: Sequence[float]) -> float | None:
    known = [v for v in values if np.isfinite(v)]
    return round(float(np.median(known)), 2) if known else None


def _least(values: Iterable[float]) -> float | None:
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


def draw_contact_sheet(folder: Path, rows: Sequence[IndexRow]) -> None:
    """`folder/contact_sheet.png`: image and heights of chips drawn evenly from all sites and splits."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from canopy.chips.store import ChipShards

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


def _spread(rows: Sequence[IndexRow]) -> list[IndexRow]:
    """Up to 24 chips, site by site and split by split in turn."""
    groups: dict[tuple[str, str], list[IndexRow]] = {}
    for row in rows:
        groups.setdefault((row.split, row.site), []).append(row)
    # Within a group every n-th, so that several pictures of one site are not neighbours.
    each = -(-_SAMPLES // max(len(groups), 1))
    queues = [members[:: max(1, len(members) // each)] for members in groups.values()]
    out: list[IndexRow] = []
    for turn in range(max((len(q) for q in queues), default=0)):
        out += [queue[turn] for queue in queues if turn < len(queue)]
    return out[:_SAMPLES]


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
    `canopy.chips.store`), index.csv and index.parquet, summary.json and contact_sheet.png. Running again
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


SITE = "procedural forest"
_PER_SHARD = 64
_FORMAT = 1  # raise it when the same seeds would give other chips


def write_made(folder: Path, chips: Iterable[Chip], source: str, licence: str = "") -> list[IndexRow]:
    """Write chips as `canopy data chips` would have left them: shards/, and last index.csv and .parquet.

    Args:
        folder: created; chips: each with a unique id; source: says what they are, in every shard.

    Returns:
        The index's rows.
    """
    rows: list[IndexRow] = []
    waiting: dict[str, list[Chip]] = {}
    count: dict[str, int] = {}

    def flush(split: str) -> None:
        name = f"shards/{split}-{count.get(split, 0):04d}.safetensors"
        count[split] = count.get(split, 0) + 1
        write_store(folder / name, waiting[split], source)
        rows.extend(row_of_chip(chip, name, licence) for chip in waiting.pop(split))

    for chip in chips:
        waiting.setdefault(chip.row.split, []).append(chip)
        if len(waiting[chip.row.split]) == _PER_SHARD:
            flush(chip.row.split)
    for split in list(waiting):
        flush(split)
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
        yield Chip(ChipRow(f"synth_{seed}", SITE, "synth", "train"), np.maximum(tile.rgb, 1), chm)


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
    settings = {"format": _FORMAT, "synth": {"count": count, "size_px": side_px, "first_seed": first_seed}}
    known, text = folder / "settings.json", json.dumps(settings, indent=2) + "\n"
    same = known.is_file() and known.read_text() == text
    if same and (folder / INDEX_CSV).is_file():
        return {"chips": count, "settings": settings, "cut_now": False}
    if not (same or overwrite) and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("holds other files", where=folder, remedy="name another folder or --overwrite")
    with told_as_output(folder):
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    for old in [folder / INDEX_CSV, *folder.glob("shards/*")]:
        old.unlink(missing_ok=True)
    with replacing(known) as part:
        part.write_text(text)
    progress.start(count, "drawing the procedural forest")
    write_made(folder, _told(synth_chips(count, side_px, first_seed), progress), SITE, "Apache-2.0")
    return {"chips": count, "settings": settings, "cut_now": True}


def _told(chips: Iterator[Chip], progress: Progress) -> Iterator[Chip]:
    for chip in chips:
        yield chip
        progress.advance()
