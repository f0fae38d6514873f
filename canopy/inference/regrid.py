"""Heights from the grid they were predicted on to the grid the user asked for.

Predictions go to a scratch file first: resampling then needs no more memory than a window, however the two
grids lie to each other. GDAL resamples: to coarser pixels heights are averaged, to finer ones interpolated.
Both work on height x validity and on validity itself and divide, so that missing pixels never pull a height
towards zero.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from canopy.errors import OutputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.reading import raster_env
from canopy.inference.engine import RunSummary, Sink, Source
from canopy.inference.layers import Extras
from canopy.runtime import Progress

TILE_PX = 1024
# A coarse pixel gets a height when at least half of it could be predicted.
LEAST_SHARE = 0.5
# How far a height is carried to a fine pixel that has imagery but no prediction; no further, and always read
# along, so that the result does not depend on where a window ends.
FILL_PX = 8
# How far GDAL may be from the exact place of a pixel, in predicted pixels.
EXACT_PX = 0.001
# From here on a pixel is the mean of those it covers, below it is interpolated between its four neighbours;
# GDAL would widen that kernel where pixels become coarser at all.
AVERAGE_ABOVE = 1.5
_PLAIN = {"XSCALE": 1, "YSCALE": 1}


class Scratch:
    """A temporary GeoTIFF that takes predictions.

    Bands: layer x validity, ..., validity, whether the acquisition day is known, that day (else 0).
    """

    def __init__(self, path: Path, grid: Grid, layers: int = 1) -> None:
        try:
            self._dataset = rasterio.open(
                path, "w", driver="GTiff", dtype="float32", count=layers + 3, crs=grid.crs.to_wkt(),
                transform=grid.transform, height=grid.height, width=grid.width, tiled=True,
                blockxsize=512, blockysize=512, compress="deflate", zlevel=1, bigtiff="if_safer",
            )  # fmt: skip
        except rasterio.errors.RasterioError as error:
            raise OutputError(f"cannot write there ({error})", where=path.parent) from error
        self._folder = path.parent

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None:
        """Take (layers + 1, h, w) layers and days, with (h, w) validity."""
        window = Window(col_off, row_off, valid.shape[1], valid.shape[0])
        kept = np.where(valid, values, 0)
        bands = [*kept[:-1], valid, kept[-1] > 0, kept[-1]]
        try:
            self._dataset.write(np.stack(bands).astype(np.float32), window=window)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise OutputError(f"cannot write predictions ({error})", where=self._folder) from error

    def close(self) -> None:
        self._dataset.close()


def regrid(
    scratch: Path,
    grid: Grid,
    sink: Sink,
    source: Source,
    summary: RunSummary,
    *,
    aoi: AOI | None = None,
    extras: Extras | None = None,
    progress: Progress | None = None,
) -> None:
    """Resample a closed scratch file to `grid` and hand it to `sink`, tile by tile.

    On finer grids validity comes from the imagery itself, read on that grid; on coarser ones a pixel is valid
    when at least half of it was.

    Args:
        summary: takes the statistics of the resampled map.
        extras: bands beside heights; the scratch file holds the layers they are made of.
    """
    extras = extras or Extras()
    summary.pixels, tiles = grid.height * grid.width, tiles_over(grid, TILE_PX)
    if progress:
        progress.start(len(tiles), "resampling")
    with raster_env(), rasterio.open(scratch) as dataset, ExitStack() as stack:
        own = Grid.of(dataset.crs.to_wkt(), dataset.transform, dataset.shape)
        finer, coarser = grid.gsd_m < 0.999 * own.gsd_m, grid.gsd_m > AVERAGE_ABOVE * own.gsd_m
        around = grid.pad(FILL_PX)
        smooth, nearest = (
            stack.enter_context(
                WarpedVRT(
                    dataset, crs=around.crs.to_wkt(), transform=around.transform, width=around.width,
                    height=around.height, resampling=how, tolerance=EXACT_PX, dtype="float32",
                    **(_PLAIN if how == Resampling.bilinear else {}),
                )
            )
            for how in (Resampling.average if coarser else Resampling.bilinear, Resampling.nearest)
        )  # fmt: skip
        for tile in tiles:
            row, col = grid.offset_of(tile)
            if finer:
                window = Window(col, row, tile.width + 2 * FILL_PX, tile.height + 2 * FILL_PX)
                layers, filled = _filled(*_read(smooth, nearest, window)[:2])
                imagery = source.read(tile)
                valid, days = imagery.valid & filled, imagery.date
            else:
                window = Window(col + FILL_PX, row + FILL_PX, tile.width, tile.height)
                layers, share, days = _read(smooth, nearest, window)
                valid = share >= LEAST_SHARE
            if aoi is not None and not aoi.is_box:
                valid &= aoi.mask(tile)
            summary.count(layers[0], valid, days, extras.tallest_m)
            sink.write(np.where(valid, extras.stack(layers, days), np.float32(np.nan)), valid, row, col)
            if progress:
                progress.advance()


def _read(smooth: WarpedVRT, nearest: WarpedVRT, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layers (n, h, w), share of each pixel that is valid (0..1), and days, (h, w), in a window."""
    *weighted, share, known, summed = smooth.read(window=window)
    layers = [np.divide(w, share, out=np.zeros_like(share), where=share > 0) for w in weighted]
    days = nearest.read(smooth.count, window=window)
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
