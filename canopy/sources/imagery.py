"""Where pixels come from: one function from a source and a Grid to RGB, validity and acquisition dates.

`open_imagery` takes whatever the user has - a file, several files, a directory, a VRT, a URL, a STAC API or
catalog, a web-tile template, or the name of a source in `data_manifests/imagery` - and returns an object
whose `read(grid)` gives pixels on any north-up grid. A pixel's value does not depend on which window it
was read with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from canopy.errors import AreaError, ImageryError, InputError
from canopy.geo.aoi import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid
from canopy.geo.paths import check_name
from canopy.sources import paths

if TYPE_CHECKING:
    from odc.geo.crs import CRS


@dataclass(frozen=True)
class Imagery:
    """Pixels on a grid.

    Attributes:
        rgb: float32 (3, height, width), red-green-blue in 0..1; 0 where not valid.
        valid: bool (height, width); True where there is an image.
        date: int32 (height, width), days since 1970-01-01 of the acquisition; 0 = unknown or not valid.
        grid: where the pixels are.
    """

    rgb: NDArray[np.float32]
    valid: NDArray[np.bool_]
    date: NDArray[np.int32]
    grid: Grid

    @classmethod
    def empty(cls, grid: Grid) -> Imagery:
        """No image anywhere on `grid`."""
        shape = grid.shape
        return cls(np.zeros((3, *shape), np.float32), np.zeros(shape, bool), np.zeros(shape, np.int32), grid)


@dataclass(frozen=True)
class ReadOptions:
    """What the user said about how to read the images; None means: as the source declares.

    Attributes:
        bands: 1-based band numbers of red, green and blue.
        nodata: a pixel whose red, green and blue all have this value is missing (any, if it is below 0).
        crs: CRS of images that carry none.
        fallback_crs: the same, guessed from what the user said about the map: for files only, after `crs`.
        scale: pixel value that means white.
        datetime: STAC-style instant or interval that limits acquisitions.
        gsd_m: ground sample distance that the caller will read at; web tiles choose their zoom by it.
    """

    bands: str | Sequence[int] | None = None
    nodata: float | None = None
    crs: str | None = None
    scale: float | None = None
    datetime: str | None = None
    gsd_m: float | None = None
    fallback_crs: str | None = None


SWAP_HINT = "swapping latitude and longitude would find imagery: --bbox takes LAT,LON, --bounds takes W,S,E,N"


@runtime_checkable
class ImagerySource(Protocol):
    """Images that can be read on any grid. Thread-safe: every thread has its own file handles."""

    @property
    def name(self) -> str:
        """What to call it in messages and tags; holds no secrets."""
        ...

    @property
    def native_crs(self) -> CRS:
        """CRS of the (topmost) image."""
        ...

    @property
    def native_gsd_m(self) -> float:
        """Ground metres per pixel of the finest image."""
        ...

    @property
    def native_grid(self) -> Grid | None:
        """The grid of an image, or of tiles of one lattice, north up, maybe in degrees; None without one."""
        ...

    @property
    def has_own_extent(self) -> bool:
        """True where `area()` is that of the images, whatever was asked for; not for searches and tiles."""
        ...

    @property
    def dates(self) -> tuple[str, ...]:
        """Known acquisition days, ISO, sorted."""
        ...

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """Ids of the images, topmost first."""
        ...

    @property
    def notes(self) -> list[str]:
        """Warnings to show to the user."""
        ...

    def area(self) -> AOI | None:
        """Outline of all images, or None where the source does not know."""
        ...

    def covers(self, aoi: AOI) -> bool:
        """True when the area lies wholly inside the outline (or the outline is unknown)."""
        ...

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`; outside the images they are not valid."""
        ...


def open_imagery(
    source: str | Path | Sequence[str | Path],
    *,
    area: AOI | None = None,
    bands: str | Sequence[int] | None = None,
    nodata: float | None = None,
    crs: str | None = None,
    scale: float | None = None,
    datetime: str | None = None,
    gsd_m: float | None = None,
    fallback_crs: str | None = None,
) -> ImagerySource:
    """Open images of any kind.

    Args:
        source: a file, a directory of images, a .vrt, an http(s) URL of an image, a STAC API or catalog
            (URL or path), a web-tile template with {z}/{x}/{y} or {q}, the name of a source of the
            manifests, or several files or URLs, earlier ones on top.
        area: what will be read; required by searchable sources (STAC APIs), a help to others.
        bands: band numbers of red, green and blue, counted from 1.
        nodata: a pixel whose red, green and blue all have this value is missing (any, if it is below 0).
        crs: CRS of images that carry none.
        scale: pixel value that means white; required for images that are not uint8.
        datetime: an acquisition instant or interval such as `2021-06/2021-09`.
        gsd_m: ground metres per pixel that will be read; web tiles choose their zoom by it (default 0.5).
        fallback_crs: as `crs`, which goes before it; where images carry a CRS or need none it is passed by.

    Raises:
        InputError: a name that is not accepted, or an option that does not fit.
        ImageryError: an image that cannot be read as RGB; FetchError for remote hosts.
        AreaError: no imagery in `area`.
    """
    options = ReadOptions(bands, nodata, crs, scale, datetime, gsd_m, fallback_crs)
    many = not isinstance(source, (str, Path))
    items = [str(item) for item in source] if many else [str(source)]  # type: ignore[union-attr]
    if not items or not all(item.strip() for item in items):
        raise InputError("no image was given", expected="a file, a URL or the name of a source")
    for item in items:
        if not paths.is_url(item):
            check_name(item, InputError)
    if len(items) == 1:
        return _open_one(items[0], area, options, may_be_name=not isinstance(source, Path))
    return _open_several(items, options)


def _open_several(items: list[str], options: ReadOptions) -> ImagerySource:
    from canopy.sources.files import open_files

    for item in items:
        if not paths.is_url(item) and not Path(item).is_file():
            raise _not_found(
                item, "when several images are given, each must be a file or the URL of an image"
            )
    return open_files(items, options, name=_joined_name(items))


def _open_one(item: str, area: AOI | None, options: ReadOptions, *, may_be_name: bool) -> ImagerySource:
    path = Path(item)
    bare = may_be_name and not path.suffix and len(path.parts) == 1
    if bare and not path.is_file():
        # Before directories: `make demo` leaves a folder called demo, and --imagery demo means the source.
        from canopy.sources.manifest import known_names
        from canopy.sources.named import open_named

        if item in known_names() or not path.exists():
            return open_named(item, area, options)
    if paths.is_template(item):
        from canopy.sources.xyz import open_template

        return open_template(item, options, area=area)
    if paths.is_url(item):
        return _open_url(item, area, options)
    if path.is_dir():
        return _open_directory(path, area, options)
    if path.is_file():
        if path.suffix.lower() in (".json", ".geojson"):
            from canopy.sources.stac import open_static

            return open_static(item, area, options)
        from canopy.sources.files import open_files

        return open_files([item], options, name=item)
    raise _not_found(item, "check the path; a source of the manifests is given by its bare name")


def _open_url(url: str, area: AOI | None, options: ReadOptions) -> ImagerySource:
    from canopy.sources import http

    named = Path(url.split("?")[0]).suffix.lower() in paths.RASTER_SUFFIXES
    if named or paths.looks_like_raster(http.first_bytes(url)):
        from canopy.sources.files import open_files

        return open_files([url], options, name=paths.redact(url))
    from canopy.sources.stac import open_stac_url

    return open_stac_url(url, area, options)


def _open_directory(folder: Path, area: AOI | None, options: ReadOptions) -> ImagerySource:
    for index in ("catalog.json", "collection.json"):
        if (folder / index).is_file():
            from canopy.sources.stac import open_static

            return open_static(str(folder / index), area, options)
    from canopy.sources.files import open_files

    files = [str(path) for path in paths.list_directory(folder)]
    return open_files(files, options, name=str(folder), newest_first=True)


def _joined_name(items: list[str]) -> str:
    first = paths.redact(items[0])
    return first if len(items) == 1 else f"{first} and {len(items) - 1} more"


def _not_found(item: str, remedy: str) -> InputError:
    return ImageryError("no such file or directory", where=item, remedy=remedy)


def check_coverage(source: ImagerySource, aoi: AOI) -> None:
    """Refuse an area where the source has no image at all.

    Raises:
        AreaError: nothing there; says so when swapping latitude and longitude would find imagery.
    """
    outline = source.area()
    if outline is None or overlaps(outline, aoi):
        return
    swapped = swapped_area(aoi)
    remedy = f"the imagery covers {outline.describe()}"
    if swapped is not None and overlaps(outline, swapped):
        remedy = SWAP_HINT
    raise AreaError(f"no imagery there ({aoi.describe()})", where=source.name, remedy=remedy)


def overlaps(one: AOI, other: AOI) -> bool:
    """True when two areas share some ground."""
    return bool(one.to_crs("EPSG:4326").geometry.intersects(other.to_crs("EPSG:4326").geometry))


def contains(outer: AOI, inner: AOI) -> bool:
    """True when `inner` lies wholly inside `outer`, to within a millionth of a degree (0.1 m)."""
    return bool(outer.to_crs("EPSG:4326").geometry.buffer(1e-6).covers(inner.to_crs("EPSG:4326").geometry))


def swapped_area(aoi: AOI) -> AOI | None:
    """The area that the same numbers mean in the other axis order, or None where that is nowhere."""
    from shapely.ops import transform

    geometry = aoi.to_crs("EPSG:4326").geometry
    west, south, east, north = geometry.bounds
    if max(abs(west), abs(east)) > 90 or max(abs(south), abs(north)) > 180:
        return None
    return AOI(transform(lambda x, y: (y, x), geometry), to_crs("EPSG:4326"), aoi.is_box)
