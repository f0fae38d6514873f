"""Heights from the grid they were predicted on to the grid the user asked for.

Predictions go to a scratch file first: resampling then needs no more memory than a window, however the two
grids lie to each other. To coarser pixels heights are averaged, to finer ones interpolated. Both work on
height x validity and on validity itself and divide, so that missing pixels never pull a height towards zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import rasterio
from rasterio.windows import Window

from canopy.errors import OutputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace, shrink_factor
from canopy.geo.reading import raster_env
from canopy.geo.warp import resample
from canopy.inference.engine import RunSummary, Sink, Source
from canopy.inference.layers import Extras
from canopy.runtime import Progress

TILE_PX = 1024
# A coarse pixel gets a height when at least half of it could be predicted.
LEAST_SHARE = 0.5
# How far a height is carried to a fine pixel that has imagery but no prediction; no further, and always read
# along, so that the result does not depend on where a window ends.
FILL_PX = 8


class Scratch:
    """A temporary GeoTIFF that takes predictions.

    Bands: layer x validity, ..., validity, whether the acquisition day is known, that day (else 0).
    """

    def __init__(self, path: Path, grid: Grid, layers: int = 1) -> None:
        self.path, self.grid, self.layers = path, grid, layers
        self._dataset: rasterio.io.DatasetWriter | None = None

    def __enter__(self) -> Scratch:
        try:
            self._dataset = rasterio.open(
                self.path, "w", driver="GTiff", dtype="float32", count=self.layers + 3,
                crs=self.grid.crs.to_wkt(), transform=self.grid.transform,
                height=self.grid.height, width=self.grid.width, tiled=True,
                blockxsize=512, blockysize=512, compress="deflate", zlevel=1, bigtiff="if_safer",
            )  # fmt: skip
        except rasterio.errors.RasterioError as error:
            raise OutputError(f"cannot write there ({error})", where=self.path.parent) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._dataset is not None:
            self._dataset.close()

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None:
        """Take (layers + 1, h, w) layers and days, with (h, w) validity."""
        if self._dataset is None:
            raise RuntimeError("the scratch file is not open")
        window = Window(col_off, row_off, valid.shape[1], valid.shape[0])
        kept = np.where(valid, values, 0)
        bands = [*kept[:-1], valid, kept[-1] > 0, kept[-1]]
        try:
            self._dataset.write(np.stack(bands).astype(np.float32), window=window)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise OutputError(f"cannot write predictions ({error})", where=self.path.parent) from error


def regrid(
    scratch: Path,
    grid: Grid,
    sink: Sink,
    source: Source,
    *,
    aoi: AOI | None = None,
    extras: Extras | None = None,
    whole: Grid | None = None,
    progress: Progress | None = None,
) -> RunSummary:
    """Resample a closed scratch file to `grid` and hand it to `sink`, tile by tile.

    On finer grids validity comes from the imagery itself, read on that grid; on coarser ones a pixel is valid
    when at least half of it was.

    Args:
        extras: bands beside heights; the scratch file holds the layers they are made of.
        whole: the grid that the scratch file is a window of. Positions are counted on it, so that a map made
            window by window has the bytes of one made at once. The scratch file's own grid by default.

    Returns:
        Statistics of the resampled map (its `seconds` and `crops` stay 0).
    """
    extras = extras or Extras()
    summary = RunSummary()
    tiles = list(_tiles(grid))
    if progress:
        progress.start(len(tiles), "resampling")
    with raster_env(), rasterio.open(scratch) as dataset:
        part = _Part(dataset, whole, extras.layers)
        finer = part.shrink_to(grid) < 0.999
        for row, col, tile in tiles:
            if finer:
                layers, filled = _filled(*_resample(part, tile.pad(FILL_PX))[:2])
                imagery = source.read(tile)
                valid, days = imagery.valid & filled, imagery.date
            else:
                layers, share, days = _resample(part, tile)
                valid = share >= LEAST_SHARE
            if aoi is not None and not aoi.is_box:
                valid &= aoi.mask(tile)
            summary.count(layers[0], valid, days)
            sink.write(np.where(valid, extras.stack(layers, days), np.float32(np.nan)), valid, row, col)
            if progress:
                progress.advance()
    return summary


def _tiles(grid: Grid) -> Iterator[tuple[int, int, Grid]]:
    for row in range(0, grid.height, TILE_PX):
        for col in range(0, grid.width, TILE_PX):
            height, width = min(TILE_PX, grid.height - row), min(TILE_PX, grid.width - col)
            yield row, col, grid.window(row, col, height, width)


class _Part:
    """An open scratch file as the window of a larger grid that it is; what lies outside was not predicted."""

    def __init__(self, dataset: rasterio.io.DatasetReader, whole: Grid | None, layers: int) -> None:
        self._dataset, self.layers = dataset, layers
        own = Grid.of(dataset.crs.to_wkt(), dataset.transform, dataset.shape)
        self.whole = whole or own
        self._row, self._col = self.whole.offset_of(own)
        self._place = SourcePlace.of_grid(self.whole)

    def shrink_to(self, grid: Grid) -> float:
        """Predicted pixels per pixel of `grid`; the same for every window of a map."""
        return shrink_factor(self._place, grid.crs, grid.pixel)

    def read(self, tile: Grid, bands: tuple[int, ...], resampling: str | None = None) -> np.ndarray:
        """Bands (b, h, w) on `tile`, resampled by the place of its pixels on the whole grid; 0 outside."""

        def native(row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
            return self._native(bands, row, col, height, width), np.ones((height, width), bool)

        return resample(self._place, tile, native, len(bands), resampling)[0]

    def _native(self, bands: tuple[int, ...], row: int, col: int, height: int, width: int) -> np.ndarray:
        values = np.zeros((len(bands), height, width), np.float32)
        row, col = row - self._row, col - self._col
        top, left = max(row, 0), max(col, 0)
        bottom, right = min(row + height, self._dataset.height), min(col + width, self._dataset.width)
        if top < bottom and left < right:
            values[:, top - row : bottom - row, left - col : right - col] = self._dataset.read(
                bands, window=Window(left, top, right - left, bottom - top)
            )
        return values


def _resample(part: _Part, tile: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layers (n, h, w), share of each pixel that is valid (0..1), and days, (h, w), on `tile`."""
    count = part.layers
    *weighted, share, known, summed = part.read(tile, tuple(range(1, count + 4)))
    layers = [np.divide(w, share, out=np.zeros_like(share), where=share > 0) for w in weighted]
    days = part.read(tile, (count + 3,), "nearest")[0]
    # The nearest pixel may have no image where others of a coarser pixel have: then their mean day.
    mean = np.divide(summed, known, out=np.zeros_like(share), where=known > 0)
    return np.stack(layers), share, np.where(days > 0, days, np.rint(mean)).astype(np.int32)


def _filled(layers: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Layers without the frame of `FILL_PX` that came with them, and where there is a height.

    Pixels that no prediction reaches get their nearest neighbour's height, within the frame's width: the
    imagery can be valid at a fine pixel whose coarse pixel was not.
    """
    missing = share <= 0
    known = ~missing
    if missing.any() and known.any():
        from scipy import ndimage

        distance, (rows, cols) = ndimage.distance_transform_edt(missing, return_indices=True)
        layers, known = layers[:, rows, cols], distance <= FILL_PX
    inner = np.s_[FILL_PX:-FILL_PX, FILL_PX:-FILL_PX]
    return layers[(slice(None), *inner)], known[inner]
