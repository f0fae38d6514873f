"""Cut one shard: read, register, screen, and write its chips. A pure function of the plan's shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from canopy.chips.cut import mark_missing
from canopy.chips.index import IndexRow, as_texts, row_of
from canopy.chips.plan import LABEL_FACTOR, Block, CutRules, PlannedChip, Shard
from canopy.chips.register import Shift, measure_shift
from canopy.chips.screen import NO_LABEL, ScreenRules, screen
from canopy.chips.store import NO_SHOTS, Chip, ChipRow, write_shard
from canopy.chips.targets import Target, chm_target, gap_weight, shots_on, unknown_target
from canopy.errors import DataError, FetchError, ImageryError
from canopy.files import file_sha256, replacing
from canopy.geo.grid import Grid
from canopy.sources.imagery import Imagery, open_imagery

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
    shift = measure_shift(image.rgb, heights, known & present, grid.gsd_m)
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
