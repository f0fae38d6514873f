"""Cut one shard: read, register, screen and write its chips. A pure function of the plan's shard.

A data pack's pairs as they are, whole and not registered, are read by `read_pack`.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.index import SHARDS, ChipRow, as_texts, height_facts, row_of
from canopy.chips.plan import LABEL_FACTOR, Block, CutRules, PlannedChip, Shard
from canopy.chips.register import Shift, image_shift
from canopy.chips.screen import NO_LABEL, ScreenRules, mark_missing, screen
from canopy.chips.store import LABEL_GSD_M, NO_HEIGHT, NO_SHOTS, Chip, write_store
from canopy.chips.targets import Target, chm_target, gap_weight, shots_on, unknown_target
from canopy.errors import DataError, FetchError, ImageryError
from canopy.files import file_sha256, replacing
from canopy.geo.grid import Grid
from canopy.imagery.base import Imagery
from canopy.imagery.open import open_imagery

DISPLACED = "image and label lie too far apart"
UNREADABLE = "unreadable"
_LEAST_SHIFT_M = 0.5  # half a label pixel: below it, moving changes nothing
_PACK_COLUMNS = ("id", "kind", "site", "rgb_path", "chm_path", "rgb_res_m", "chm_res_m", "split")


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
    path = folder / SHARDS / f"{shard.name}.safetensors"
    chips: list[Chip] = []
    rows: list[ChipRow] = []
    for block in shard.blocks:
        for found in _cut_block(block, shard.rules):
            if isinstance(found, Chip):
                chips.append(found)
                rows.append(replace(found.row, shard=f"{SHARDS}/{path.name}"))
            else:
                rows.append(found)
    if chips:
        write_store(path, chips, shard.key)
    with replacing(path.with_suffix(".json")) as part:
        sha256 = file_sha256(path) if chips else ""
        record = {"key": shard.key, "sha256": sha256, "rows": [as_texts(row) for row in rows]}
        part.write_text(json.dumps(record, indent=0) + "\n")
    return True


def read_rows(shard: Shard, folder: Path) -> list[ChipRow] | None:
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


def _cut_block(block: Block, rules: CutRules) -> Iterator[Chip | ChipRow]:
    """For every planned chip of the block the chip, or the row that says why there is none."""
    wanted = [chip for chip in block.chips if not chip.reason]
    yield from (_row(block, chip, chip.reason) for chip in block.chips if chip.reason)
    if not wanted:
        return
    # The window around all chips of the block, those of other splits left out.
    top, left = (min(chip.window[k] for chip in block.chips) for k in (0, 1))
    bottom, right = (max(chip.window[k] + chip.window[k + 2] for chip in block.chips) for k in (0, 1))
    grid = block.grid.window(top, left, bottom - top, right - left)
    try:
        image, target, shift, moved = _read(block, grid, rules)
        shots = shots_on(block.pair.gedi, _label_grid(grid), rh=rules.rh) if block.pair.gedi else NO_SHOTS
    except FetchError:
        raise
    except (ImageryError, DataError) as error:
        yield from (_row(block, chip, f"{UNREADABLE}: {error.what}") for chip in wanted)
        return
    facts: dict[str, Any] = {}
    if shift is not None:
        facts = {
            "shift_down_m": round(shift.down_m, 3), "shift_right_m": round(shift.right_m, 3),
            "shift_sure": shift.is_sure, "shift_applied": moved,
        }  # fmt: skip
    too_far = shift is not None and shift.is_sure and shift.length_m > rules.most_shift_m
    for planned in wanted:
        chip = _cut_chip(block, planned, (top, left), image, target, shots)
        row = replace(chip.row, **facts)
        if too_far and not row.reason:
            row = replace(row, reason=DISPLACED)
        yield row if row.reason else replace(chip, row=row)


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
    corner: tuple[int, int],
    image: Imagery,
    target: Target,
    shots: np.ndarray,
) -> Chip:
    """The chip, its row filled; `image`, `target` and `shots` begin at `corner` of the block's grid."""
    (row, col), n = (chip.window[k] - corner[k] for k in (0, 1)), LABEL_FACTOR
    height, width = chip.window[2:]
    here = np.s_[row : row + height, col : col + width]
    below = np.s_[row // n : (row + height) // n, col // n : (col + width) // n]
    pixels = np.round(image.rgb[:, *here] * 255).astype(np.uint8)
    pixels[:, ~image.valid[here]] = 0
    pixels = mark_missing(pixels)
    heights, known = target.height_m[below], target.valid[below]
    screening = ScreenRules() if block.pair.chm else ScreenRules(least_label=0.0)
    seen = pixels.max(axis=0) > 0
    found = screen(pixels / np.float32(255), seen, heights, known, block.grid.gsd_m, screening)
    near = shots - np.array([row // n, col // n, 0, 0], np.float32)
    near = near[((near[:, :2] >= 0) & (near[:, :2] < [height // n, width // n])).all(axis=1)]
    # GEDI shots alone are labels too, if weak ones.
    reason = "" if found.reason == NO_LABEL and len(near) else found.reason
    evidence = {k: round(v, 4) for k, v in asdict(found).items() if k != "reason"}
    facts = _row(block, chip, reason, shots=len(near), **evidence, **height_facts(heights[known]))
    return Chip(facts, pixels, np.where(known, heights, np.nan).astype(np.float32), near)


def _row(block: Block, chip: PlannedChip, reason: str, **facts: float) -> ChipRow:
    pair, gsd = block.pair, round(block.grid.gsd_m, 4)
    west, south, east, north = (round(v, 6) for v in chip.place.bounds)
    row, col, height, width = chip.window
    return ChipRow(
        id=chip.id, pair=pair.id, site=pair.site, kind=pair.kind, split=chip.place.split, reason=reason,
        row=row, col=col, height_px=height, width_px=width, gsd_m=gsd, label_gsd_m=gsd * LABEL_FACTOR,
        crs=str(chip.place.crs), west=west, south=south, east=east, north=north,
        weight=round(gap_weight(pair.gap_years), 4), floor_m=pair.floor_m,
        test_distance_m=round(chip.test_distance_m, 2), licence=pair.licence, **facts,  # type: ignore[arg-type]
    )  # fmt: skip


# ---- a data pack as it is -------------------------------------------------------------------------------
def read_pack(pack: str | Path, splits: Sequence[str] | None = None) -> tuple[list[Chip], str]:
    """Read every pair of `pack/manifest.csv`, whole and not registered.

    Args:
        pack: folder with manifest.csv; images at 0.5 m or finer, heights at 1 m in uint16 centimetres.
        splits: keep only these; None keeps all.

    Returns:
        The chips, and a sha256 over the manifest and all files it names.

    Raises:
        DataError: missing manifest, columns or files, heights of other than 1 m, or pairs whose sizes do not
            match.
    """
    manifest = Path(pack) / "manifest.csv"
    if not manifest.is_file():
        raise DataError("no manifest.csv", where=pack, expected="the folder of a data pack")
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [c for c in _PACK_COLUMNS if not rows or c not in rows[0]]
    if missing:
        raise DataError(f"lacks the columns {', '.join(missing)}", where=manifest)
    digest = hashlib.sha256(manifest.read_bytes())
    chips = []
    for row in rows:
        if splits is None or row["split"] in splits:
            for column in ("rgb_path", "chm_path"):
                digest.update((manifest.parent / row[column]).read_bytes())
            chips.append(_read_pair(manifest.parent, row))
    return chips, digest.hexdigest()


def _read_pair(pack: Path, row: dict[str, str]) -> Chip:
    import rasterio
    from rasterio.enums import Resampling

    try:
        gsd_m = float(row["chm_res_m"])
    except ValueError:
        gsd_m = float("nan")
    if gsd_m != LABEL_GSD_M:
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
