"""Sources of the manifests, opened by name; among them the demo, a synthetic forest shown as aerial imagery.

The demo's scene, of seed 0, is laid on the UTM lattice so that a spot with a road, a river and a meadow comes
to lie at the demo's point. Nothing is stored: every window is rendered when it is read.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo import CRS

from canopy.errors import ImageryError, refuse_options
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs, transformer, utm_crs
from canopy.geo.grid import Grid
from canopy.imagery.base import Imagery, ImagerySource, ReadOptions
from canopy.imagery.files import read_lattice
from canopy.imagery.manifests import ImageryManifest, named_source
from canopy.imagery.names import days_since_epoch
from canopy.synth.forest import SceneSpec, SynthTile
from canopy.synth.render import render

UINT8_WHITE = 255.0


def open_named(name: str, area: AOI | None, options: ReadOptions) -> ImagerySource:
    """Open a source of `data_manifests/imagery`.

    What the user said wins over the manifest's bands and scaling.

    Raises:
        InputError: no such source; the message names the nearest one and lists all.
    """
    manifest = named_source(name)
    source = _open(manifest, area, _with_declared(options, manifest))
    source.notes.append(f"{manifest.name}: {manifest.attribution}, {manifest.licence}")
    return source


def _with_declared(options: ReadOptions, manifest: ImageryManifest) -> ReadOptions:
    """Fill what the user left open from the manifest."""
    if manifest.kind in ("demo", "xyz"):
        return options
    # White = 255 is what uint8 means anyway; leaving it out keeps a uint16 file from passing unnoticed.
    declared = None if manifest.scale == UINT8_WHITE else manifest.scale
    return replace(
        options,
        bands=options.bands if options.bands is not None else manifest.bands,
        scale=options.scale if options.scale is not None else declared,
    )


def _open(manifest: ImageryManifest, area: AOI | None, options: ReadOptions) -> ImagerySource:
    if manifest.kind == "demo":
        refuse_options(
            {
                "--bands": options.bands, "--scale": options.scale, "--input-crs": options.crs,
                "--nodata": options.nodata, "--datetime": options.datetime,
            },
            where=manifest.name, because="the demo is a scene of its own, drawn in RGB for one day",
        )  # fmt: skip
        return DemoSource()
    if manifest.kind == "xyz":
        return _open_tiles(manifest, area, options)
    if manifest.kind == "stac":
        from canopy.imagery.stac import StacQuery, open_stac

        query = StacQuery(
            manifest.location(), manifest.name, manifest.collection, manifest.assets, manifest.signing
        )
        return open_stac(query, area, options, gsd_m=manifest.gsd_m)
    return _open_local(manifest, options)


def _open_tiles(manifest: ImageryManifest, area: AOI | None, options: ReadOptions) -> ImagerySource:
    from canopy.imagery.xyz import DEFAULT_GSD_M, TileService, TileSource

    service = TileService(
        manifest.location(),
        manifest.name,
        tile_px=manifest.tile_px,
        min_zoom=manifest.min_zoom,
        max_zoom=manifest.max_zoom,
        absent_statuses=manifest.absent_statuses,
        placeholder_sha256=manifest.placeholder_sha256,
        outline=AOI(manifest.geometry, to_crs("EPSG:4326")),
    )
    # Finer than the imagery itself there is nothing to fetch.
    wanted = replace(options, gsd_m=max(options.gsd_m or DEFAULT_GSD_M, manifest.gsd_m))
    return TileSource(service, wanted, area=area)


def _open_local(manifest: ImageryManifest, options: ReadOptions) -> ImagerySource:
    from canopy.files import is_url, list_directory
    from canopy.imagery.files import open_files

    location = manifest.location()
    if manifest.kind == "file" and (is_url(location) or Path(location).is_file()):
        return open_files([location], options, name=manifest.name)
    if manifest.kind == "dir" and Path(location).is_dir():
        files = [str(path) for path in list_directory(Path(location))]
        return open_files(files, options, name=manifest.name, newest_first=True)
    raise ImageryError(
        f"the source {manifest.name!r} reads from a {manifest.kind} that is not there", where=location
    )


LATITUDE, LONGITUDE = 44.083, -71.296
SPOT_XY = (600.0, 440.0)  # of the scene's plane, metres
SIDE_M = 2048.0
GSD_M = 0.5
DAY = date(2024, 7, 15)


class DemoSource(ImagerySource):
    """An `ImagerySource` over the synthetic scene, a square of 2048 m."""

    name = "demo"
    native_gsd_m = GSD_M
    native_grid: Grid

    def __init__(self, spec: SceneSpec | None = None) -> None:
        """Show the scene of `spec` (default: seed 0) at the demo's place."""
        self.spec = replace(spec or SceneSpec(), gsd_m=GSD_M)
        self.native_crs: CRS = utm_crs(LONGITUDE, LATITUDE)
        x, y = transformer("EPSG:4326", self.native_crs).transform(LONGITUDE, LATITUDE)
        centre = (float(round(x)), float(round(y)))
        # World coordinates of the scene plane's origin.
        self.origin_xy = (centre[0] - SPOT_XY[0], centre[1] - SPOT_XY[1])
        side_px = round(SIDE_M / GSD_M)
        west, north = centre[0] - SIDE_M / 2, centre[1] + SIDE_M / 2
        corner = Affine(GSD_M, 0, west, 0, -GSD_M, north)
        self.native_grid = Grid.of(self.native_crs, corner, (side_px, side_px))
        self.notes = ["demo: a synthetic scene, not a real place"]

    @property
    def dates(self) -> tuple[str, ...]:
        """The one day of the scene."""
        return (DAY.isoformat(),)

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """The scene by its seed."""
        return (f"synthetic scene, seed {self.spec.seed}",)

    def area(self) -> AOI:
        """The square that the scene covers."""
        return AOI.from_grid(self.native_grid)

    def pinned(self) -> dict[str, Any]:
        """Nothing but its kind: the scene is always the same."""
        return {"kind": "demo"}

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`, rendered at 0.5 m and resampled if the grid is another one."""
        values, valid = read_lattice(self._render, self.native_grid, grid)
        rgb = np.clip(values / np.float32(255.0), 0.0, 1.0)
        day = np.where(valid, np.int32(days_since_epoch(DAY)), np.int32(0))
        return Imagery(rgb, valid, day, grid)

    def truth(self, grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Exact canopy height on `grid`, metres (height, width), and validity; averaged on coarser grids."""

        def heights(window: Grid) -> tuple[np.ndarray, NDArray[np.bool_]]:
            chm = self._tile(window).chm
            return np.broadcast_to(chm, (3, *chm.shape)), np.ones(window.shape, bool)

        values, valid = read_lattice(heights, self.native_grid, grid)
        return values[0], valid

    def _render(self, window: Grid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        return self._tile(window).rgb, np.ones(window.shape, bool)

    def _tile(self, window: Grid) -> SynthTile:
        x, y = window.xy(0, 0)
        return render(self.spec, x - self.origin_xy[0], y - self.origin_xy[1], *window.shape)
