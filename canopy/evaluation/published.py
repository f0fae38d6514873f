"""The published global canopy height maps, v1 of 2024 and v2 of 2026, cut to an area (`canopy data get`).

Their tiles (EPSG:3857, quadkeys, whole metres) are read where they lie, through the one reader of height
maps, and only as far as the area needs. A cut holds what the tiles keep in other files: missing is told from
0 m, and every pixel has the date of its image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.features import rasterize

from canopy import web
from canopy.errors import AreaError, ImageryError
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.opening import open_heights
from canopy.files import check_output, host_of
from canopy.geo.area import AOI
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.grid import HALF_WORLD_M, WEB_MERCATOR, Grid, quadkey_at
from canopy.geo.reading import raster_env
from canopy.labels.catalog import LabelManifest
from canopy.runtime import NoProgress, Progress, log

BANDS = (BandSpec("canopy_height"), BandSpec("acquisition_date", "d"))
_EPOCH = date(1970, 1, 1).toordinal()
_ABSENT = (403, 404)  # S3 says 403 of a file that is not there to who may not list the bucket
# Whole rows at a time: the tiles of v1 are stored in strips of one row. In pixels of a window.
_WINDOW_PX = 1 << 22


def cut_published(
    source: LabelManifest,
    area: AOI,
    out: str | Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Cut a published map to a COG on its own pixels; returns what was done, JSON-ready.

    Bands: canopy_height (metres; nodata where the map has no valid height) and acquisition_date (days since
    1970-01-01, 0 unknown).

    Raises:
        AreaError: the map has no tile there; FetchError or ImageryError: the host did not deliver;
        OutputError: it cannot be written. Nothing is left at the output's place then.
    """
    check_output(out, overwrite=overwrite or dry_run, suffixes=(".tif", ".tiff"))
    keys = list(_quadkeys(area, source.product(None)[1].zoom or 0))
    urls = [url for url in (f"{source.href}/chm/{key}.tif" for key in keys) if _is_there(url)]
    if not urls:
        raise AreaError(
            f"{source.name} has no tile there ({area.describe()})", where=host_of(source.href),
            expected=f"one of {', '.join(keys[:4])}",
        )  # fmt: skip
    facts = {"source": source.name, "licence": source.licence, "citation": source.citation, "tiles": urls}
    if dry_run:
        return facts
    terms = {"LICENCE": source.licence, "ATTRIBUTION": source.attribution, "CANOPY_SOURCE": source.name}
    progress, known = progress or NoProgress(), 0
    with raster_env(source.href), open_heights(urls) as heights:
        assert heights.lattice is not None  # a tile is only recognised as one if it is north-up
        grid = heights.lattice.window_over(area.to_crs(WEB_MERCATOR).geometry.bounds)
        tags = terms | ({"CANOPY_DATES": "/".join(heights.dates)} if heights.dates else {})
        rows = max(64, _WINDOW_PX // grid.width)
        progress.start(len(range(0, grid.height, rows)), source.name)
        with CogWriter(out, grid, BANDS, encoding="uint16cm", tags=tags, overwrite=overwrite) as writer:
            for top in range(0, grid.height, rows):
                window = grid.window(top, 0, min(rows, grid.height - top), grid.width)
                height, valid = _read(heights, window)
                valid &= area.mask(window)
                known += int(valid.sum())
                writer.write(np.concatenate([height, _days(heights, window)[None]]), valid, top, 0)
                progress.advance()
        notes = list(heights.notes)
    for note in notes:
        log.warning(f"note: {note}")
    return facts | {
        "file": str(out), "sha256": writer.sha256, "width": grid.width, "height": grid.height,
        "gsd_m": grid.gsd_m, "dates": list(heights.dates), "notes": notes,
        "valid_fraction": known / (grid.width * grid.height),
    }  # fmt: skip


def _quadkeys(area: AOI, zoom: int) -> Iterator[str]:
    """Of the tiles whose squares the area touches."""
    west, south, east, north = area.to_crs(WEB_MERCATOR).geometry.bounds
    side = 2 * HALF_WORLD_M / (1 << zoom)
    rows = range(int((HALF_WORLD_M - north) // side), int((HALF_WORLD_M - south) // side) + 1)
    cols = range(int((west + HALF_WORLD_M) // side), int((east + HALF_WORLD_M) // side) + 1)
    for row, col in itertools.product(rows, cols):
        yield quadkey_at(row, col, zoom)


def _is_there(url: str) -> bool:
    first = web.get(url, headers={"Range": "bytes=0-0"}, what="the tile", absent=_ABSENT)
    return first.status_code not in _ABSENT


def _read(heights: HeightMap, window: Grid) -> tuple[np.ndarray, np.ndarray]:
    """As `HeightMap.read`, tried again where the host fails in a way that may pass."""

    def one_try(_: bool) -> tuple[np.ndarray, np.ndarray]:
        try:
            return heights.read(window)
        except ImageryError as error:
            heights.close()
            web.diagnose(heights.tiles[0].path, what="the map")
            raise web.Again(str(error)) from None

    return web.persist(heights.tiles[0].path, one_try)


def _days(heights: HeightMap, window: Grid) -> np.ndarray:
    """Days since 1970-01-01 of every pixel's image, the newest where some overlap; float32 (h, w)."""
    days = np.zeros(window.shape, np.float32)
    dated = [pair for tile in heights.tiles for pair in tile.acquisitions if pair[0] is not None]
    pairs = [(o, day.toordinal() - _EPOCH) for o, day in sorted(dated, key=lambda pair: pair[1])]
    return rasterize(pairs, out=days, transform=window.transform) if pairs else days
