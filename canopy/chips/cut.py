"""A data pack's pairs as they are, whole and not registered; `canopy data chips` is what training uses."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
from scipy import ndimage

from canopy.chips.store import LABEL_GSD_M, NO_HEIGHT, Chip, ChipRow
from canopy.errors import DataError

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
