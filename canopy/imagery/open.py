"""Where pixels come from: one function from a source and a Grid to RGB, validity and acquisition dates.

`open_imagery` takes whatever the user has - a file, several files, a directory, a VRT, a URL, a STAC API or
catalog, a web-tile template, or the name of a source in `data_manifests/imagery` - and returns an object
whose `read(grid)` gives pixels on any north-up grid. A pixel's value does not depend on which window it
was read with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from canopy import files as paths
from canopy.errors import ImageryError, InputError
from canopy.files import check_name
from canopy.geo.area import AOI
from canopy.imagery.base import ImagerySource, ReadOptions


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
    from canopy.imagery.files import open_files

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
        from canopy.imagery.manifests import known_names
        from canopy.imagery.named import open_named

        if item in known_names() or not path.exists():
            return open_named(item, area, options)
    if paths.is_template(item):
        from canopy.imagery.xyz import open_template

        return open_template(item, options, area=area)
    if paths.is_url(item):
        return _open_url(item, area, options)
    if path.is_dir():
        return _open_directory(path, area, options)
    if path.is_file():
        if path.suffix.lower() in (".json", ".geojson"):
            from canopy.imagery.stac import open_static

            return open_static(item, area, options)
        from canopy.imagery.files import open_files

        return open_files([item], options, name=item)
    raise _not_found(item, "check the path; a source of the manifests is given by its bare name")


def _open_url(url: str, area: AOI | None, options: ReadOptions) -> ImagerySource:
    from canopy import download as http

    named = Path(url.split("?")[0]).suffix.lower() in paths.RASTER_SUFFIXES
    if named or paths.looks_like_raster(http.first_bytes(url)):
        from canopy.imagery.files import open_files

        return open_files([url], options, name=paths.redact(url))
    from canopy.imagery.stac import open_stac_url

    return open_stac_url(url, area, options)


def _open_directory(folder: Path, area: AOI | None, options: ReadOptions) -> ImagerySource:
    for index in ("catalog.json", "collection.json"):
        if (folder / index).is_file():
            from canopy.imagery.stac import open_static

            return open_static(str(folder / index), area, options)
    from canopy.imagery.files import open_files

    files = [str(path) for path in paths.list_directory(folder)]
    return open_files(files, options, name=str(folder), newest_first=True)


def _joined_name(items: list[str]) -> str:
    first = paths.redact(items[0])
    return first if len(items) == 1 else f"{first} and {len(items) - 1} more"


def _not_found(item: str, remedy: str) -> InputError:
    return ImageryError("no such file or directory", where=item, remedy=remedy)
