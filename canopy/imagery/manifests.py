"""Named imagery sources: one strict YAML file each in `data_manifests/imagery`.

A manifest says what exists and under which terms; it never holds pixels, keys or signed URLs.
"""

from __future__ import annotations

import os
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from shapely.geometry import MultiPolygon, Polygon, box
from shapely.geometry.base import BaseGeometry

from canopy.config import Named, load_manifest, manifest_names
from canopy.errors import DataError, InputError
from canopy.geo.area import AOI

Kind = Literal["file", "dir", "stac", "xyz", "demo"]


def coverage_geometry(value: Any) -> BaseGeometry:
    """A coverage entry as a shapely geometry in EPSG:4326.

    Raises:
        ValueError: it is none of a box, a list of boxes or WKT.
    """
    import shapely

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


class ImageryManifest(Named):
    """One named source.

    Attributes:
        name: what `--imagery` takes; the file's stem.
        title: one line for lists.
        kind: file, dir, stac (an API or a static catalog), xyz (web tiles) or demo (the synthetic scene).
        href: path, URL or tile template; `${VARIABLE}` is taken from the environment when the source is
            opened.
        collection: STAC collection to search.
        assets: STAC asset keys in order of preference; empty: found by common name.
        signing: who signs the URLs just before they are read.
        bands: numbers of red, green and blue, counted from 1; None: as the files declare.
        scale: pixel value that means white.
        gsd_m: ground sample distance of the imagery, metres.
        licence, attribution: the terms; shown with results.
        dates: first and last acquisition, `2010/2023`.
        coverage: where it has imagery; see `Coverage`.
        notes: what a user should know.
        rank: order among sources that cover an area, 1 = first choice; None: never chosen by itself.
        tile_px, min_zoom, max_zoom: layout of web tiles.
        absent_statuses: HTTP statuses by which the tile server says "no imagery here".
        placeholder_sha256: digests of tiles that mean "no imagery here".
    """

    title: str
    kind: Kind
    href: str = ""
    collection: str | None = None
    assets: tuple[str, ...] = ()
    signing: Literal["planetary-computer"] | None = None
    bands: tuple[int, int, int] | None = None
    scale: float = Field(default=255.0, gt=0)
    gsd_m: float = Field(gt=0)
    licence: str
    attribution: str
    dates: str
    coverage: Coverage
    notes: str = ""
    rank: int | None = Field(default=None, ge=1)
    tile_px: int = Field(default=256, gt=0)
    min_zoom: int = Field(default=0, ge=0, le=24)
    max_zoom: int = Field(default=19, ge=0, le=24)
    absent_statuses: tuple[int, ...] = ()
    placeholder_sha256: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> ImageryManifest:
        if self.kind != "demo" and not self.href:
            raise ValueError(f"kind {self.kind} needs href")
        if self.kind == "demo" and self.rank is not None:
            raise ValueError("the demo is never chosen by itself: it has no rank")
        return self

    @property
    def geometry(self) -> BaseGeometry:
        """Where the source has imagery, EPSG:4326 (a simplified outline, slightly generous)."""
        return coverage_geometry(self.coverage)

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


def known_names() -> list[str]:
    """Names of all sources, sorted."""
    return manifest_names("imagery")


def named_source(name: str) -> ImageryManifest:
    """The manifest of a source.

    Raises:
        InputError: no such source; names the nearest one and lists all. ConfigError: its file is wrong.
    """
    what = "file, directory or named source"
    return load_manifest(ImageryManifest, "imagery", name, what, besides="a path, a URL, or ")


def all_sources() -> list[ImageryManifest]:
    """Every source, sorted by name."""
    return [named_source(name) for name in known_names()]


def best_source(area: AOI) -> ImageryManifest | None:
    """The best-ranked real source whose coverage holds the whole area (never the demo), or None."""
    wanted = area.to_crs("EPSG:4326").geometry
    if wanted.is_empty:
        raise DataError("an empty area")
    fitting = [m for m in all_sources() if m.rank is not None and m.geometry.covers(wanted)]
    return min(fitting, key=lambda m: (m.rank, m.gsd_m, m.name), default=None)
