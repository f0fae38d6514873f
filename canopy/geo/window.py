"""read_window: the pixels of an open dataset on any Grid. The one reader of canopy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from odc.geo import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from canopy.errors import ImageryError
from canopy.geo.complaints import gdal_complaints
from canopy.geo.crs import transformer
from canopy.geo.grid import PHASE_TOL_PX, Grid
from canopy.geo.opening import SourcePlace, raster_env
from canopy.geo.paths import public_name
from canopy.geo.warp import block_mean, plan_warp, warp_window

# values (b, h, w) in the file's dtype, valid (h, w) -> the same after a palette, a placeholder test...
Decoder = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class _DamagedImage(ImageryError):  # noqa: N818  (an ImageryError for everyone else)
    """Damage that GDAL only mentioned in its log."""


def read_window(
    ds: DatasetReader,
    grid: Grid,
    indexes: Sequence[int],
    *,
    resampling: str | None = None,
    nodata: float | None = None,
    crs: Any | None = None,
    decode: Decoder | None = None,
    colours: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Bands `indexes` (1-based) of a dataset on `grid`: float32 (b, h, w) in the file's own units,
    unscaled, and valid (h, w), True = usable.

    When the grid shares the dataset's lattice (same CRS or one that differs by nothing, phase within
    1e-3 px) pixels are copied; on a lattice of whole multiples they are averaged; otherwise they are
    resampled once (`canopy.geo.warp`). A pixel's value never depends on the window it was asked in.
    Anything outside the dataset is invalid; rotated and south-up datasets come out north-up. Invalid
    values are 0.

    Args:
        resampling: None (average when shrinking by more than 1.5, else bilinear), "nearest",
            "bilinear", "cubic" or "average".
        nodata: replaces the file's own nodata value.
        crs: replaces the file's own CRS.
        decode: applied to source pixels before any resampling; see `Decoder`. Its bands are returned.
        colours: the bands are one colour. Then a nodata value that a colour can have (0 or more) means a
            missing pixel only where ALL bands have it: a black collar, not a dark pixel.

    Validity is the intersection of the file's masks (internal, or a .msk file that carries GDAL's own
    mark; Meta's inverted .tif.msk does not and is ignored), alpha above 0, nodata in ANY band (but see
    `colours`), and finiteness; for every type of pixel.

    Raises ImageryError naming the file and the window when a block is truncated or damaged; an error
    is never turned into nodata. Damage that GDAL passes over in silence (JPEG data) also closes `ds`.
    Use one dataset handle per thread.
    """
    place = SourcePlace.of(ds, crs).in_turn_of(grid)

    def read(row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        values, valid = _read_native(ds, indexes, Window(col, row, width, height), nodata, colours)
        return decode(values, valid) if decode else (values, valid)

    bands = len(indexes) if decode is None else _decoded_bands(ds, indexes, decode)
    try:
        with raster_env(ds.name):
            ratio = lattice_ratio(place, grid)
            if ratio == 1 or (ratio is not None and resampling in (None, "average")):
                return copy_window(place, grid, read, bands, ratio)
            return warp_window(plan_warp(place, grid, resampling), grid, read, bands)
    except _DamagedImage:
        # The wrong pixels are in GDAL's block cache now, and a second read would not complain.
        ds.close()
        raise


def lattice_ratio(place: SourcePlace, grid: Grid) -> int | None:
    """n when each target pixel is exactly n x n source pixels (1: same lattice), else None.

    The answer holds for the whole lattice, not only for this window.
    """
    return _lattice_ratio(place, grid.crs, grid.pixel, grid.lattice[2:])


@lru_cache(maxsize=1024)
def _lattice_ratio(
    place: SourcePlace, crs: CRS, pixel: tuple[float, float], phase: tuple[float, float]
) -> int | None:
    if not place.is_north_up or not _same_place(place, crs):
        return None
    source_px, source_py = place.transform.a, -place.transform.e
    ratio = round(pixel[0] / source_px)
    # The drift over the whole dataset must stay below the tolerance, not only that of one pixel.
    longest = max(place.height, place.width)
    for target, source in zip(pixel, (source_px, source_py), strict=True):
        if ratio < 1 or abs(target / source / ratio - 1) * longest > PHASE_TOL_PX:
            return None
    # Where the source's corner lies on the target's lattice, in source pixels from a target corner.
    col = (place.transform.c / pixel[0] - phase[1]) * ratio
    row = (-place.transform.f / pixel[1] - phase[0]) * ratio
    # Rounding of `phase` (1e-6 target px) is far inside the tolerance.
    return ratio if max(abs(col - round(col)), abs(row - round(row))) < PHASE_TOL_PX else None


def _same_place(place: SourcePlace, crs: CRS) -> bool:
    """Whether coordinates mean the same in both CRSs, within 1e-3 px over the whole dataset."""
    if place.crs == crs:
        return True
    if place.crs.geographic != crs.geographic:
        return False
    cols, rows = np.meshgrid(np.linspace(0, place.width, 5), np.linspace(0, place.height, 5))
    x, y = place.xy(rows.ravel(), cols.ravel())
    tx, ty = transformer(place.crs, crs).transform(x, y)
    limit_x, limit_y = PHASE_TOL_PX * place.transform.a, PHASE_TOL_PX * -place.transform.e
    return bool(np.all(np.abs(tx - x) < limit_x) and np.all(np.abs(ty - y) < limit_y))


def copy_window(
    place: SourcePlace, grid: Grid, read: Decoder | Callable, bands: int, ratio: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a shared (or n times coarser) lattice, padded by hand: rasterio shrinks silently."""
    row, col = (round(v) for v in place.rowcol(*grid.xy(0, 0)))
    if ratio == 1:
        return _frame(place, read, bands, (row, col, *grid.shape), ratio)
    values = np.zeros((bands, *grid.shape), dtype=np.float32)
    valid = np.zeros(grid.shape, dtype=bool)
    step = max(1, 4096 // ratio)
    for top in range(0, grid.height, step):
        for left in range(0, grid.width, step):
            h, w = min(step, grid.height - top), min(step, grid.width - left)
            r0, c0 = row + top * ratio, col + left * ratio
            part = _frame(place, read, bands, (r0, c0, h * ratio, w * ratio), ratio)
            here = np.s_[top : top + h, left : left + w]
            values[:, *here], valid[here] = part
    return values, valid


def _frame(
    place: SourcePlace, read: Callable, bands: int, window: tuple[int, int, int, int], ratio: int
) -> tuple[np.ndarray, np.ndarray]:
    """One source window, padded with invalid pixels, averaged over ratio x ratio.

    A coarse pixel cut by the source's edge counts when its centre is inside, as everywhere in canopy.
    """
    r0, c0, h, w = window
    values = np.zeros((bands, h, w), dtype=np.float32)
    valid = np.zeros((h, w), dtype=bool)
    inside = np.zeros((h, w), dtype=bool)
    top, left = max(r0, 0), max(c0, 0)
    bottom, right = min(r0 + h, place.height), min(c0 + w, place.width)
    if bottom > top and right > left:
        got, good = read(top, left, bottom - top, right - left)
        here = np.s_[top - r0 : bottom - r0, left - c0 : right - c0]
        values[:, *here] = got if good.all() else np.where(good, got, 0)
        valid[here], inside[here] = good, True
    if ratio == 1:
        return values, valid
    share, _ = block_mean(inside[None].astype(np.float32), inside, ratio)
    mean, whole = block_mean(values, valid | ~inside, ratio)
    low, high = (ratio - 1) // 2, ratio // 2
    centre = inside[low::ratio, low::ratio] | inside[high::ratio, high::ratio]
    good = whole & centre
    return np.where(good, mean / np.maximum(share, 1e-9), 0), good


# ---- source pixels ----------------------------------------------------------------------------
def _read_native(
    ds: DatasetReader, indexes: Sequence[int], window: Window, nodata: float | None, colours: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Values (b, h, w) in the file's dtype and valid (h, w) of a window inside the dataset."""
    shape = (int(window.height), int(window.width))
    try:
        with gdal_complaints() as complaints:
            values = ds.read(list(indexes), window=window)
            valid = _mask_of(ds, indexes, window)
    except (RasterioError, OSError, MemoryError) as error:
        raise _damaged(ds, window, error.__cause__ or error) from error
    if complaints:
        raise _damaged(ds, window, complaints[0], _DamagedImage)
    if values.shape[1:] != shape:
        raise ImageryError(
            f"read {values.shape[2]} x {values.shape[1]} px instead of {shape[1]} x {shape[0]}",
            where=public_name(ds.name),
        )
    if values.dtype.kind == "c":
        raise ImageryError("complex numbers", where=public_name(ds.name), expected="real bands")
    return values, valid & _is_data(ds, indexes, values, nodata, colours)


def _damaged(
    ds: DatasetReader, window: Window, reason: object, kind: type[ImageryError] = ImageryError
) -> ImageryError:
    bottom, right = window.row_off + window.height, window.col_off + window.width
    return kind(
        f"unreadable pixels in rows {window.row_off}-{bottom}, columns {window.col_off}-{right} "
        f"({' '.join(str(reason).split())[:160]})",
        where=public_name(ds.name),
        remedy="the file is truncated or damaged; fetch it again",
    )


def _mask_of(ds: DatasetReader, indexes: Sequence[int], window: Window) -> np.ndarray:
    """Internal masks and alpha, intersected (GDAL alone would let one hide the other)."""
    valid = np.ones((int(window.height), int(window.width)), dtype=bool)
    flags = ds.mask_flag_enums
    for alpha in (i for i, c in enumerate(ds.colorinterp, 1) if c == ColorInterp.alpha):
        valid &= ds.read(alpha, window=window) > 0
    masked = [
        i for i in indexes if not {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha} & {*flags[i - 1]}
    ]
    if masked:
        shared = all(MaskFlags.per_dataset in flags[i - 1] for i in masked)
        for index in masked[:1] if shared else masked:
            valid &= ds.read_masks(index, window=window) > 0
    return valid


def _is_data(
    ds: DatasetReader, indexes: Sequence[int], values: np.ndarray, nodata: float | None, colours: bool
) -> np.ndarray:
    """Finite and not nodata; see `read_window` for the any/all rule."""
    is_float = values.dtype.kind == "f"
    valid = np.isfinite(values).all(axis=0) if is_float else np.ones(values.shape[1:], dtype=bool)
    marks = [ds.nodatavals[i - 1] if nodata is None else nodata for i in indexes]
    marked = [(band, m) for band, m in zip(values, marks, strict=True) if m is not None and m == m]
    if marked:
        # Bands without a mark cannot veto: a collar is where the marked ones agree.
        together = np.logical_and if colours and min(m for _, m in marked) >= 0 else np.logical_or
        valid &= ~together.reduce([band == _as_dtype(m, values.dtype) for band, m in marked])
    return valid


def _as_dtype(mark: float, dtype: np.dtype) -> Any:
    """A nodata mark as the band stores it (-3.4e38 in a float32 file is not the float64 number)."""
    return dtype.type(mark) if dtype.kind == "f" else mark


def _decoded_bands(ds: DatasetReader, indexes: Sequence[int], decode: Decoder) -> int:
    """How many bands `decode` makes, told from one empty pixel."""
    dtype = ds.dtypes[indexes[0] - 1]
    return decode(np.zeros((len(indexes), 1, 1), dtype), np.zeros((1, 1), bool))[0].shape[0]
