"""`--layout published`: the map again, in tiles named and stored as the published canopy-height maps are.

    v1: zoom 9,  65,536 px: chm/QUADKEY.tif, msk/QUADKEY.tif.msk (255 = masked), metadata/QUADKEY.geojson
    v2: zoom 10, 32,768 px: chm/QUADKEY.tif, metadata/QUADKEY.tif (year of the imagery - 2000)

Both: EPSG:3857 at 1.194 m, uint8 whole metres, and tiles.geojson. Unlike the published ones, our tiles also
say in the file itself what is not mapped (nodata 255): bare ground and no data cannot be confused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.windows import Window

from canopy.errors import ConfigError, OutputError
from canopy.files import replacing
from canopy.geo.grid import Grid
from canopy.geo.raster import BandSpec, CogWriter, raster_env
from canopy.geo.tiles import HALF_WORLD_M, quadkey_grid, quadkeys
from canopy.inference.region.ledger import Ledger, Row
from canopy.inference.region.plan import Prepared
from canopy.inference.region.task import tile_path
from canopy.inference.region.tiling import TileTask, Tiling
from canopy.inference.stac_item import write_json

FOLDER = "published"
# World pixels of the published maps, as a power of two: 2 * HALF_WORLD_M / 2**25 = 1.194 m.
LEVEL = 25
LEAST_SHARE = 0.5
YEAR_0 = 2000
_WINDOW = 2048


@dataclass(frozen=True)
class PublishedLayout:
    """One of the published layouts: the zoom of its tiles, and how masks and dates are kept."""

    name: str
    zoom: int

    @property
    def tile_px(self) -> int:
        return 1 << (LEVEL - self.zoom)


LAYOUTS = {
    "published": PublishedLayout("v2", 10),
    "published-v1": PublishedLayout("v1", 9),
    "published-v2": PublishedLayout("v2", 10),
}


def write_published(ledger: Ledger, prepared: Prepared, layout: PublishedLayout | None = None) -> Path:
    """Assemble DIR/published from the finished tiles; tiles that are there already are made again.

    Raises:
        ConfigError: a run whose pixels are not those of quadkeys, or coarser than the published 1.194 m.
        OutputError: a file cannot be written.
    """
    settings = prepared.settings
    layout = layout or LAYOUTS[settings.layout]
    tiling = prepared.tiling
    ratio = published_ratio(tiling)
    folder = settings.folder / FOLDER
    for name in ("chm", "metadata", *(["msk"] if layout.name == "v1" else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = {(row.task.row, row.task.col): row for row in ledger.rows("done")}
    features = []
    for quadkey in quadkeys(prepared.aoi, layout.zoom):
        dates = _write_tile(folder, quadkey, layout, _Mosaic(settings.folder, tiling, ratio, rows))
        outline = quadkey_grid(quadkey, 1).outline("EPSG:4326")
        geometry = json.loads(json.dumps(outline.__geo_interface__))
        properties: dict[str, Any] = {"tile": quadkey}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
        if layout.name == "v1":
            acquired = {
                "type": "Feature",
                "geometry": geometry,
                "properties": {"acq_date": dates[-1] if dates else None},
            }
            write_json(
                folder / "metadata" / f"{quadkey}.geojson",
                {"type": "FeatureCollection", "features": [acquired]},
            )
    write_json(folder / "tiles.geojson", {"type": "FeatureCollection", "features": features})
    return folder


def published_ratio(tiling: Tiling) -> int:
    """Pixels of the run along one of the published maps'. Raises ConfigError where that is not whole."""
    published = 2 * HALF_WORLD_M / (1 << LEVEL)
    ratio = round(published / tiling.area.pixel[0])
    if tiling.kind != "quadkey" or ratio < 1:
        raise ConfigError(
            "the published layout is assembled from quadkey tiles of 1.194 m (EPSG:3857) or finer",
            where="--layout", remedy="use --grid quadkey, and --gsd 1 or smaller",
        )  # fmt: skip
    return ratio


@dataclass(frozen=True)
class _Mosaic:
    """The run's finished tiles on the published pixel."""

    folder: Path
    tiling: Tiling
    ratio: int
    rows: dict[tuple[int, int], Row]

    def read(self, window: Grid) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Metres, years since 2000 (255: unknown or not mapped), both (h, w), and dates, on a window.

        A pixel is the mean of the run's valid pixels in it, where these are at least half of it.
        """
        k, (height, width) = self.ratio, window.shape
        row, col = (v * k for v in window.origin_rc)
        fine = np.full((height * k, width * k), np.nan, np.float32)
        year = np.full((height, width), 255, np.uint8)
        dates: set[str] = set()
        for task, found in self._touching(row, col, *fine.shape):
            top, left, h, w = self.tiling.offset(task.row, task.col)
            row0, col0 = self.tiling.area.origin_rc
            top, left = top + row0 - row, left + col0 - col  # in `fine`; may begin or end outside
            r0, c0, r1, c1 = (
                max(0, top),
                max(0, left),
                min(fine.shape[0], top + h),
                min(fine.shape[1], left + w),
            )
            with rasterio.open(tile_path(self.folder, task.id)) as dataset:
                part = dataset.read(1, window=Window(c0 - left, r0 - top, c1 - c0, r1 - r0), masked=True)
                fine[r0:r1, c0:c1] = part.astype(np.float32).filled(np.nan) * dataset.scales[0]
            days = found.facts.get("dates", [])
            dates.update(days)
            if days:
                here = np.s_[r0 // k : -(-r1 // k), c0 // k : -(-c1 // k)]
                year[here] = np.uint8(min(254, max(0, int(days[-1][:4]) - YEAR_0)))
        blocks = fine.reshape(height, k, width, k)
        known = np.isfinite(blocks)
        share = known.mean(axis=(1, 3))
        total = np.where(known, blocks, 0).sum(axis=(1, 3), dtype=np.float64)
        height_m = np.divide(
            total, known.sum(axis=(1, 3)), out=np.full((height, width), np.nan), where=share > 0
        )
        height_m[share < LEAST_SHARE] = np.nan
        year[~np.isfinite(height_m)] = 255
        return height_m.astype(np.float32), year, sorted(dates)

    def _touching(self, row: int, col: int, height: int, width: int) -> Iterator[tuple[TileTask, Row]]:
        side = self.tiling.tile_px
        for i in range(row // side, -(-(row + height) // side)):
            for j in range(col // side, -(-(col + width) // side)):
                if (i, j) in self.rows:
                    yield self.rows[i, j].task, self.rows[i, j]


def _write_tile(folder: Path, quadkey: str, layout: PublishedLayout, mosaic: _Mosaic) -> list[str]:
    """Write one published tile and what belongs to it; returns the days of its imagery."""
    grid = quadkey_grid(quadkey, layout.tile_px)
    path = folder / "chm" / f"{quadkey}.tif"
    dates: set[str] = set()
    with raster_env():
        writer = CogWriter(path, grid, [BandSpec("canopy_height", "m")], encoding="uint8m", overwrite=True)
        with writer, _plain(_side_file(folder, quadkey, layout), grid) as write_side:
            for top, left, window in _windows(grid, mosaic.tiling.area):
                height_m, year, days = mosaic.read(window)
                valid = np.isfinite(height_m)
                if not valid.any():
                    continue
                dates.update(days)
                writer.write(height_m[None], valid, top, left)
                write_side(np.where(valid, 0, 255) if layout.name == "v1" else year, top, left)
    return sorted(dates)


def _side_file(folder: Path, quadkey: str, layout: PublishedLayout) -> Path:
    """The mask of v1, the dates of v2."""
    return (
        folder / "msk" / f"{quadkey}.tif.msk"
        if layout.name == "v1"
        else folder / "metadata" / f"{quadkey}.tif"
    )


def _windows(grid: Grid, area: Grid) -> Iterator[tuple[int, int, Grid]]:
    """Windows of a published tile that the run's area touches."""
    west, south, east, north = area.bounds
    for top in range(0, grid.height, _WINDOW):
        for left in range(0, grid.width, _WINDOW):
            window = grid.window(top, left, min(_WINDOW, grid.height - top), min(_WINDOW, grid.width - left))
            w, s, e, n = window.bounds
            if w < east and e > west and s < north and n > south:
                yield top, left, window


@contextlib.contextmanager
def _plain(path: Path, grid: Grid) -> Iterator[Callable[[np.ndarray, int, int], None]]:
    """A tiled uint8 GeoTIFF of 255; gives what stores (h, w) values at (row, col)."""
    with replacing(path) as part:
        try:
            dataset = rasterio.open(
                part, "w", driver="GTiff", dtype="uint8", count=1, nodata=255, tiled=True,
                height=grid.height, width=grid.width, crs=grid.crs.to_wkt(), transform=grid.transform,
                blockxsize=512, blockysize=512, compress="deflate", sparse_ok=True, bigtiff="if_safer",
            )  # fmt: skip
        except rasterio.errors.RasterioError as error:
            raise OutputError(f"cannot be written ({error})", where=path) from error

        def write(values: np.ndarray, row: int, col: int) -> None:
            window = Window(col, row, values.shape[1], values.shape[0])
            dataset.write(values.astype(np.uint8), 1, window=window)

        with dataset:
            yield write
