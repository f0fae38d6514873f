"""Sources of the manifests: one strict YAML file each in `data_manifests/imagery`, opened by name.

A manifest says what exists and under which terms; it never holds pixels, keys or signed URLs. One of them is
the demo, a synthetic forest shown as aerial imagery: its scene, of seed 0, is laid on the UTM lattice so that
a spot with a road, a river and a meadow comes to lie at the demo's point. Nothing of it is stored: every
window is rendered when it is read.
"""

from __future__ import annotations

import os
import string
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from odc.geo import CRS
from pydantic import AfterValidator, Field, model_validator
from shapely.geometry import MultiPolygon, Polygon, box
from shapely.geometry.base import BaseGeometry

from canopy.config import Named, load_manifest, manifest_names
from canopy.errors import FetchError, ImageryError, InputError, refuse_options
from canopy.files import is_url, list_directory
from canopy.geo.area import AOI
from canopy.geo.crs import transformer, utm_crs
from canopy.geo.grid import Grid
from canopy.imagery.base import Imagery, ImagerySource, ReadOptions, read_lattice
from canopy.imagery.dates import days_since_epoch
from canopy.imagery.xyz import DEFAULT_GSD_M, TileLayout, TileService, open_tiles
from canopy.runtime import log
from canopy.synth.forest import SceneSpec, SynthTile
from canopy.synth.render import render
from canopy.terms import Terms, Use, use_of


def coverage_geometry(value: Any) -> BaseGeometry:
    """A coverage entry as a shapely geometry in EPSG:4326.

    Raises:
        ValueError: it is none of a box, a list of boxes or WKT.
    """
    if isinstance(value, str):
        try:
            return shapely.from_wkt(value)
        except shapely.errors.ShapelyError as error:
            raise ValueError(f"coverage is not WKT: {error}") from None
    boxes = [value] if value and not isinstance(value[0], (list, tuple)) else value
    if any(west >= east or south >= north for west, south, east, north in boxes):
        raise ValueError("coverage box is not [west, south, east, north]")
    return shapely.union_all([box(*bounds) for bounds in boxes])


def _an_area(value: Any) -> Any:
    geometry = coverage_geometry(value)
    if geometry.is_empty or not geometry.is_valid or not isinstance(geometry, (Polygon, MultiPolygon)):
        raise ValueError("coverage is not a valid area")
    west, south, east, north = geometry.bounds
    if west < -180 or east > 180 or south < -90 or north > 90:
        raise ValueError("coverage is outside -180..180, -90..90 (west, south, east, north)")
    return value


Box = tuple[float, float, float, float]
Coverage = Annotated[str | Box | list[Box], AfterValidator(_an_area)]
"""Where a source has something, in EPSG:4326: [west, south, east, north], a list of such boxes, or WKT."""


UINT8_WHITE = 255.0
_FINE_ENOUGH_M = 0.5


class ImageryManifest(Named, TileLayout):
    """One named source; see also `TileLayout`.

    Attributes:
        name: what `--imagery` takes; the file's stem.
        title: one line for lists.
        kind: file, dir, stac (an API or a static catalog), xyz (web tiles) or demo (the synthetic scene).
        href: path, URL or tile template; `${VARIABLE}` is taken from the environment when the source is
            opened.
        collection: STAC collection to search, or several.
        assets: STAC asset keys in order of preference; empty: found by common name.
        signing: who signs the URLs just before they are read.
        bands: numbers of red, green and blue, counted from 1; None: as the files declare.
        scale: pixel value that means white.
        country: where it is, for lists.
        gsd_m: ground sample distance of the imagery, metres.
        season: whether broadleaf trees have leaves in it; None: unknown or both.
        licence, attribution, commercial_use: the terms; shown with results. The last by default as the
            licence's name tells.
        dates: first and last acquisition, `2010/2023`.
        coverage: where it has imagery; see `Coverage`.
        notes: what a user should know.
        rank: order among sources that are alike, 1 = first; None: never chosen by itself. See `sources_for`.
        fallback: name of the source that is read instead when this one's host does not answer.
        unverified: what is said here without having been checked.
    """

    title: str
    kind: Literal["file", "dir", "stac", "xyz", "demo"]
    href: str = ""
    collection: str | tuple[str, ...] | None = None
    assets: tuple[str, ...] = ()
    signing: Literal["planetary-computer"] | None = None
    bands: tuple[int, int, int] | None = None
    scale: float = Field(default=UINT8_WHITE, gt=0)
    country: str = "elsewhere"
    gsd_m: float = Field(gt=0)
    season: Literal["leaf-on", "leaf-off"] | None = None
    licence: str
    attribution: str
    commercial_use: Use | None = None
    dates: str
    coverage: Coverage
    notes: str = ""
    rank: int | None = Field(default=None, ge=1)
    fallback: str | None = None
    unverified: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> ImageryManifest:
        if self.kind != "demo" and not self.href:
            raise ValueError(f"kind {self.kind} needs href")
        return self

    @property
    def geometry(self) -> BaseGeometry:
        """Where the source has imagery, EPSG:4326 (a simplified outline, slightly generous)."""
        return coverage_geometry(self.coverage)

    @property
    def terms(self) -> Terms:
        """Licence, attribution, and whether it may be used commercially."""
        use = self.commercial_use or use_of(self.licence)
        return Terms(licence=self.licence, attribution=self.attribution, commercial_use=use)

    def location(self) -> str:
        """`href` with `${VARIABLE}` filled from the environment.

        Raises:
            InputError: a variable is not set.
        """
        try:
            return string.Template(self.href).substitute(os.environ)
        except KeyError as error:
            raise InputError(
                f"the source {self.name!r} reads from the place named by ${error.args[0]}, which is not set",
                remedy=f"set {error.args[0]} to the directory or address of the images",
            ) from None


def named_source(name: str) -> ImageryManifest:
    """The manifest of a source.

    Raises:
        InputError: no such source; names the nearest one and lists all. ConfigError: its file is wrong.
    """
    what = "file, directory or named source"
    return load_manifest(ImageryManifest, "imagery", name, what, besides="a path, a URL, or ")


def all_sources() -> list[ImageryManifest]:
    """Every source, sorted by name."""
    return [named_source(name) for name in manifest_names("imagery")]


def sources_for(area: AOI) -> list[ImageryManifest]:
    """Sources whose coverage holds the whole area, best first: the freest, then with leaves, then the finest.

    Finer than models look, all are alike: then by rank, and the newest comes first.
    """

    def merit(m: ImageryManifest) -> tuple[Any, ...]:
        use = ("yes", "ask", "no").index(m.terms.commercial_use)
        season = ("leaf-on", None, "leaf-off").index(m.season)
        newest = int(m.dates.rpartition("/")[2][:4])
        return use, season, max(m.gsd_m, _FINE_ENOUGH_M), m.rank, -newest, m.gsd_m, m.name

    return sorted((m for m in all_sources() if m.rank and m.geometry.covers(area.lonlat)), key=merit)


# ---- opening ---------------------------------------------------------------------------------
def open_named(name: str, area: AOI | None, options: ReadOptions) -> ImagerySource:
    """Open a source of `data_manifests/imagery`.

    What the user said wins over the manifest's bands and scaling. Where its host fails, another source may
    stand in for all of it, with a note; two are never mixed.

    Raises:
        InputError: no such source; the message names the nearest one and lists all.
    """
    manifest = named_source(name)
    try:
        source = _open(manifest, area, options)
    except FetchError as error:
        if manifest.fallback is None or options.datetime or options.bands or options.scale:
            raise  # what was asked for cannot be had from the other
        source = open_named(manifest.fallback, area, options)
        note = f"{name} does not answer ({error.what}): all is read from {manifest.fallback} instead"
        log.warning(note)
        source.notes.insert(0, note)
        return source
    source.terms = manifest.terms
    source.notes.append(f"{manifest.name}: {source.terms.text}")
    return source


def _open(manifest: ImageryManifest, area: AOI | None, options: ReadOptions) -> ImagerySource:
    if manifest.kind == "demo":
        refuse_options(
            {
                "--bands": options.bands, "--nodata": options.nodata, "--scale": options.scale,
                "--input-crs": options.crs, "--datetime": options.datetime,
            },
            where="demo", because="the demo is a scene of its own, drawn in RGB for one day",
        )  # fmt: skip
        return DemoSource()
    location = manifest.location()
    if manifest.kind == "xyz":
        layout = manifest.model_dump(include={"name", *TileLayout.model_fields})
        service = TileService(template=location, outline=manifest.geometry.wkt, **layout)
        # Finer than the imagery itself there is nothing to fetch.
        gsd_m = max(options.gsd_m or DEFAULT_GSD_M, manifest.gsd_m)
        return open_tiles(service, replace(options, gsd_m=gsd_m), area)
    # White = 255 is what uint8 means anyway; leaving it out keeps a uint16 file from passing unnoticed.
    scale = None if manifest.scale == UINT8_WHITE else manifest.scale
    options = replace(
        options,
        bands=manifest.bands if options.bands is None else options.bands,
        scale=scale if options.scale is None else options.scale,
    )
    if manifest.kind == "stac":
        from canopy.imagery.stac import open_stac

        return open_stac(
            location, area, options, name=manifest.name, collection=manifest.collection,
            assets=manifest.assets, signing=manifest.signing, gsd_m=manifest.gsd_m,
        )  # fmt: skip
    from canopy.imagery.files import open_files

    if manifest.kind == "file" and (is_url(location) or Path(location).is_file()):
        return open_files([location], options, name=manifest.name)
    if manifest.kind == "dir" and Path(location).is_dir():
        files = [str(path) for path in list_directory(Path(location))]
        return open_files(files, options, name=manifest.name, newest_first=True)
    raise ImageryError(
        f"the source {manifest.name!r} reads from a {manifest.kind} that is not there", where=location
    )


# ---- the demo --------------------------------------------------------------------------------
LATITUDE, LONGITUDE = 44.083, -71.296
SPOT_XY = (600.0, 440.0)  # of the scene's plane, metres
SIDE_M = 2048.0
DAY = date(2024, 7, 15)


class DemoSource(ImagerySource):
    """A square of the synthetic forest, by default the demo's of 2048 m.

    Scenes of one seed and pixel size show the same trees at the same places, whatever their extent.

    Attributes:
        spec: what stands there.
        origin_xy: world coordinates of the scene plane's origin.
    """

    name = "demo"
    native_grid: Grid

    def __init__(self, spec: SceneSpec | None = None, size_m: float = SIDE_M) -> None:
        """Lay `size_m` (in whole pixels) of a scene round the demo's point, in its UTM zone."""
        self.spec = spec or SceneSpec()
        self.native_crs: CRS = utm_crs(LONGITUDE, LATITUDE)
        x, y = transformer("EPSG:4326", self.native_crs).transform(LONGITUDE, LATITUDE)
        self.origin_xy = round(x) - SPOT_XY[0], round(y) - SPOT_XY[1]
        gsd = self.native_gsd_m = self.spec.gsd_m
        side = max(round(size_m / gsd), 1)
        # Whole pixels from the plane's origin, which is the lattice that `render` paints on.
        col, row = round(SPOT_XY[0] / gsd) - side // 2, round(SPOT_XY[1] / gsd) + side // 2
        corner = Affine(gsd, 0, self.origin_xy[0] + col * gsd, 0, -gsd, self.origin_xy[1] + row * gsd)
        self.native_grid = Grid.of(self.native_crs, corner, (side, side))
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

    def _pin(self) -> dict[str, Any]:
        return {"kind": "demo"}

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`, rendered at 0.5 m and resampled if the grid is another one."""

        def picture(window: Grid) -> tuple[np.ndarray, NDArray[np.bool_]]:
            return self.tile(window).rgb, np.ones(window.shape, bool)

        values, valid = read_lattice(picture, self.native_grid, grid)
        rgb = np.clip(values / np.float32(UINT8_WHITE), 0.0, 1.0)
        return Imagery(rgb, valid, np.where(valid, np.int32(days_since_epoch(DAY)), np.int32(0)), grid)

    def tile(self, window: Grid) -> SynthTile:
        """Picture and truth of a window of the scene's lattice (InputError for another grid)."""
        row, col = self.native_grid.offset_of(window)
        x, y = self.native_grid.xy(row, col)
        return render(self.spec, x - self.origin_xy[0], y - self.origin_xy[1], *window.shape)
