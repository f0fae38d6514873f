"""Where pixels come from: one function from a source and a Grid to RGB, validity and acquisition dates.

`open_imagery` takes whatever the user has - a file, several files, a directory, a VRT, a URL, a STAC API or
catalog, a web-tile template, the name of a source in `data_manifests/imagery`, or an xarray DataArray with a
CRS - and returns an object whose `read(grid)` gives pixels on any north-up grid. A pixel's value does not
depend on which window it was read with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy import download
from canopy.errors import ImageryError, InputError
from canopy.files import (
    RASTER_SUFFIXES,
    check_name,
    is_template,
    is_url,
    list_directory,
    looks_like_raster,
    redact,
)
from canopy.geo.area import AOI
from canopy.imagery.base import ImagerySource, ReadOptions

if TYPE_CHECKING:
    import xarray


def open_imagery(
    source: str | Path | Sequence[str | Path] | xarray.DataArray,
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
            manifests, several files or URLs, earlier ones on top, or a DataArray (band, y, x) with a CRS.
        area: what will be read; required by searchable sources (STAC APIs), a help to others.
        bands: band numbers of red, green and blue, counted from 1.
        nodata: a pixel whose red, green and blue all have this value is missing (any, if it is below 0).
        crs: CRS of the images, in place of what they say.
        scale: pixel value that means white; required for images that are not uint8.
        datetime: an acquisition instant or interval such as `2021-06/2021-09`.
        gsd_m: ground metres per pixel that will be read; web tiles choose their zoom by it (default 0.5).
        fallback_crs: CRS of images that carry none.

    Returns:
        The source: `read(grid)`, `to_xarray()`, and `close()` or `with`.

    Raises:
        InputError: a name that is not accepted, or an option that does not fit.
        ImageryError: an image that cannot be read as RGB; FetchError for remote hosts.
        AreaError: no imagery in `area`.
    """
    options = ReadOptions(bands, nodata, crs, scale, datetime, gsd_m, fallback_crs)
    if hasattr(source, "dims"):
        from canopy.imagery.arrays import open_array

        return open_array(source, options)
    items = [str(source)] if isinstance(source, (str, Path)) else [str(item) for item in source]
    if not items or not all(item.strip() for item in items):
        raise InputError("no image was given", expected="a file, a URL or the name of a source")
    for item in items:
        if not is_url(item):
            check_name(item, InputError)
    if len(items) == 1:
        return _open_one(items[0], area, options, may_be_name=not isinstance(source, Path))
    return _open_several(items, options)


def open_pinned(pin: Mapping[str, Any], *, area: AOI | None = None) -> ImagerySource:
    """Open what `ImagerySource.pinned` described: the same images in the same order, without a search.

    Args:
        pin: as JSON keeps it.
        area: of all scenes, open only those that touch it.

    Raises:
        AreaError: none of the scenes touches the area.
    """
    if pin["kind"] == "scenes":
        from canopy.imagery.files import Mosaic

        return Mosaic.from_pin(pin, area)
    if pin["kind"] == "tiles":
        from canopy.imagery.xyz import TileSource

        return TileSource.from_pin(pin)
    from canopy.imagery.named import DemoSource

    return DemoSource()


def _open_several(items: list[str], options: ReadOptions) -> ImagerySource:
    from canopy.imagery.files import open_files

    for item in items:
        if not is_url(item) and not Path(item).is_file():
            raise _not_found(
                item, "when several images are given, each must be a file or the URL of an image"
            )
    return open_files(items, options, name=f"{redact(items[0])} and {len(items) - 1} more")


def _open_one(item: str, area: AOI | None, options: ReadOptions, *, may_be_name: bool) -> ImagerySource:
    path = Path(item)
    bare = may_be_name and not path.suffix and len(path.parts) == 1
    if bare and not path.is_file():
        # Before directories: `make demo` leaves a folder called demo, and --imagery demo means the source.
        from canopy.imagery.manifests import known_names
        from canopy.imagery.named import open_named

        if item in known_names() or not path.exists():
            return open_named(item, area, options)
    if is_template(item):
        from canopy.imagery.xyz import TileService, TileSource

        return TileSource(TileService(item, redact(item)), options, area=area)
    if path.is_dir() and not is_url(item):
        return _open_directory(path, area, options)
    if is_url(item):
        suffix = Path(item.split("?")[0]).suffix.lower()
        catalog = suffix not in RASTER_SUFFIXES and not looks_like_raster(download.first_bytes(item))
    elif path.is_file():
        catalog = path.suffix.lower() in (".json", ".geojson")
    else:
        raise _not_found(item, "check the path; a source of the manifests is given by its bare name")
    if catalog:
        return _open_catalog(item, area, options)
    from canopy.imagery.files import open_files

    return open_files([item], options, name=redact(item) if is_url(item) else item)


def _open_catalog(href: str, area: AOI | None, options: ReadOptions) -> ImagerySource:
    from canopy.imagery.stac import StacQuery, open_stac

    return open_stac(StacQuery(href, redact(href) if is_url(href) else href), area, options)


def _open_directory(folder: Path, area: AOI | None, options: ReadOptions) -> ImagerySource:
    for index in ("catalog.json", "collection.json"):
        if (folder / index).is_file():
            return _open_catalog(str(folder / index), area, options)
    from canopy.imagery.files import open_files

    return open_files(
        [str(path) for path in list_directory(folder)], options, name=str(folder), newest_first=True
    )


def _not_found(item: str, remedy: str) -> InputError:
    return ImageryError("no such file or directory", where=item, remedy=remedy)
