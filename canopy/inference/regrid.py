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
from canopy.geo.aoi import AOI
from canopy.geo.grid import Grid
from canopy.geo.raster import read_window
from canopy.inference.engine import RunSummary, Sink, Source
from canopy.runtime import Progress

TILE_PX = 1024
# A coarse pixel gets a height when at least half of it could be predicted.
LEAST_SHARE = 0.5


class Scratch:
    """A temporary GeoTIFF that takes predictions: bands height x validity, validity, acquisition day."""

    def __init__(self, path: Path, grid: Grid) -> None:
        self.path, self.grid = path, grid
        self._dataset: rasterio.io.DatasetWriter | None = None

    def __enter__(self) -> Scratch:
        try:
            self._dataset = rasterio.open(
                self.path, "w", driver="GTiff", dtype="float32", count=3, crs=self.grid.crs.to_wkt(),
                transform=self.grid.transform, height=self.grid.height, width=self.grid.width, tiled=True,
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
        """Take (2, h, w) heights and days, with (h, w) validity."""
        if self._dataset is None:
            raise RuntimeError("the scratch file is not open")
        window = Window(col_off, row_off, valid.shape[1], valid.shape[0])
        bands = [np.where(valid, values[0], 0), valid, np.where(valid, values[1], 0)]
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
    date_band: bool = False,
    progress: Progress | None = None,
) -> RunSummary:
    """Resample a closed scratch file to `grid` and hand it to `sink`, tile by tile.

    On finer grids validity comes from the imagery itself, read on that grid; on coarser ones a pixel is valid
    when at least half of it was.

    Returns:
        Statistics of the resampled map (its `seconds` and `crops` stay 0).
    """
    summary = RunSummary()
    tiles = list(_tiles(grid))
    if progress:
        progress.start(len(tiles), "resampling")
    with rasterio.open(scratch) as dataset:
        finer = grid.gsd_m < 0.999 * Grid.of(dataset.crs.to_wkt(), dataset.transform, dataset.shape).gsd_m
        for row, col, tile in tiles:
            height_m, share, days = _resample(dataset, tile)
            valid = share > 0 if finer else share >= LEAST_SHARE
            if finer:
                imagery = source.read(tile)
                valid, days = imagery.valid & _filled(height_m, share), imagery.date
            if aoi is not None and not aoi.is_box:
                valid &= aoi.mask(tile)
            summary.count(height_m, valid, days)
            bands = [height_m, days.astype(np.float32)] if date_band else [height_m]
            sink.write(np.where(valid, np.stack(bands), np.float32(np.nan)), valid, row, col)
            if progress:
                progress.advance()
    return summary


def _tiles(grid: Grid) -> Iterator[tuple[int, int, Grid]]:
    for row in range(0, grid.height, TILE_PX):
        for col in range(0, grid.width, TILE_PX):
            height, width = min(TILE_PX, grid.height - row), min(TILE_PX, grid.width - col)
            yield row, col, grid.window(row, col, height, width)


def _resample(dataset: rasterio.io.DatasetReader, tile: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heights, share of each pixel that is valid (0..1), and days, all (h, w) on `tile`."""
    (weighted, share), _ = read_window(dataset, tile, (1, 2))
    (days,), _ = read_window(dataset, tile, (3,), resampling="nearest")
    height_m = np.divide(weighted, share, out=np.zeros_like(share), where=share > 0)
    return height_m, share, days.astype(np.int32)


def _filled(height_m: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Give pixels that no prediction reaches their nearest neighbour's height, in place.

    The imagery can be valid at a fine pixel whose coarse pixel was not. Returns where there is a height now.
    """
    missing = share <= 0
    if missing.all() or not missing.any():
        return ~missing
    from scipy import ndimage

    rows, cols = ndimage.distance_transform_edt(missing, return_distances=False, return_indices=True)
    height_m[...] = height_m[rows, cols]
    return np.ones(share.shape, bool)
