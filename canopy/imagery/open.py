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

from canopy.errors import CanopyError, ImageryError, InputError
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
from canopy.imagery.base import WHITE, ImagerySource, ReadOptions
from canopy.terms import Terms

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
    on_damaged: str = "fail",
    overviews: bool | None = None,
) -> ImagerySource:
    """Open images of any kind.

    Args:
        source: a file, a directory of images, a .vrt, an http(s) URL of an image, a STAC API or catalog
            (URL or path), a web-tile template with {z}/{x}/{y}, {q} or {bbox}, the name of a source of
            the manifests, several files or URLs, earlier ones on top, or a DataArray (band, y, x) with a CRS.
        area: what will be read; required by searchable sources (STAC APIs), a help to others.
        bands: band numbers of red, green and blue, counted from 1.
        nodata: a pixel whose red, green and blue all have this value is missing (any, if it is below 0).
        crs: CRS of the images, in place of what they say.
        scale: pixel value that means white; required for images that are not uint8.
        datetime: an acquisition instant or interval such as `2021-06/2021-09`.
        gsd_m: ground metres per pixel that will be read; web tiles choose their zoom by it (default 0.5).
        fallback_crs: CRS of images that carry none.
        on_damaged: where one of several images cannot be read: `fail`, or `skip` it with a note.
        overviews: for pictures: far coarser grids are read from the files' own overviews.

    Returns:
        The source: `read(grid)`, `to_xarray()`, and `close()` or `with`.

    Raises:
        InputError: a name that is not accepted, or an option that does not fit.
        ImageryError: an image that cannot be read as RGB; FetchError for remote hosts.
        AreaError: no imagery in `area`.
    """
    options = ReadOptions(bands, nodata, crs, scale, datetime, gsd_m, fallback_crs, on_damaged, overviews)
    if hasattr(source, "dims"):
        return _open_array(source, options)
    items = [str(source)] if isinstance(source, (str, Path)) else [str(item) for item in source]
    if not items or not all(item.strip() for item in items):
        raise InputError("no image was given", expected="a file, a URL or the name of a source")
    for item in items:
        if not is_url(item):
            check_name(item, InputError)
    if len(items) == 1:
        return _open_one(items[0], area, options, may_be_name=not isinstance(source, Path))
    from canopy.imagery.files import open_files

    for item in items:
        if not (is_url(item) or Path(item).is_file() or Path(item).is_symlink()):
            raise _not_found(
                item, "when several images are given, each must be a file or the URL of an image"
            )
    return open_files(items, options, name=f"{redact(items[0])} and {len(items) - 1} more")


def open_pinned(pin: Mapping[str, Any], *, area: AOI | None = None) -> ImagerySource:
    """Open what `ImagerySource.pinned` described: the same images in the same order, without a search.

    Args:
        pin: as JSON keeps it.
        area: of all scenes, open only those that touch it.

    Raises:
        AreaError: none of the scenes touches the area.
    """
    source: ImagerySource
    if pin["kind"] == "tiles":
        from canopy.imagery.xyz import TileService, TileSource

        source = TileSource(TileService(**pin["service"]), pin["nodata"], pin["zoom"], pin["place"])
        source.notes = list(pin["notes"])
    elif pin["kind"] == "demo":
        from canopy.imagery.named import DemoSource

        source = DemoSource()
    else:
        from canopy.imagery.files import Mosaic
        from canopy.imagery.stac_items import signer

        source = Mosaic.from_pin(pin, area, signer(pin["signing"]))
    source.terms = Terms(**pin["terms"]) if pin.get("terms") else None
    return source


def _open_one(item: str, area: AOI | None, options: ReadOptions, *, may_be_name: bool) -> ImagerySource:
    path = Path(item)
    if may_be_name and not path.suffix and len(path.parts) == 1 and not path.is_file():
        # Before directories: `make demo` leaves a folder called demo, and --imagery demo means the source.
        from canopy.config import manifest_names
        from canopy.imagery.named import open_named

        if item in manifest_names("imagery") or not path.exists():
            return open_named(item, area, options)
    if is_template(item):
        from canopy.imagery.xyz import BOX_PX, TileService, open_tiles

        side_px = BOX_PX if "{bbox}" in item else 256
        return open_tiles(TileService(template=item, name=redact(item), tile_px=side_px), options, area)
    hrefs, catalog = [item], None
    if is_url(item):
        from canopy.web import peek

        suffix = Path(item.split("?")[0]).suffix.lower()
        if suffix not in RASTER_SUFFIXES and not looks_like_raster(peek(item)[0]):
            catalog = item
    elif path.is_dir():
        indexes = [path / "catalog.json", path / "collection.json"]
        catalog = next((str(index) for index in indexes if index.is_file()), None)
        hrefs = [] if catalog else [str(image) for image in list_directory(path)]
    elif not path.is_file():
        raise _not_found(item, "check the path; a source of the manifests is given by its bare name")
    elif path.suffix.lower() in (".json", ".geojson"):
        catalog = item
    if catalog:
        from canopy.imagery.stac import open_stac

        return open_stac(catalog, area, options, name=redact(catalog))
    from canopy.imagery.files import open_files

    return open_files(hrefs, options, name=redact(item), newest_first=path.is_dir())


def _not_found(item: str, remedy: str) -> InputError:
    return ImageryError("no such file or directory", where=item, remedy=remedy)


# ---- arrays ----------------------------------------------------------------------------------
_EXPECTED = "a DataArray (band, y, x) with a CRS, as rioxarray.open_rasterio gives it"


def _open_array(array: Any, options: ReadOptions) -> ImagerySource:
    """A DataArray by the rules of files: it is written to one, chunk by chunk, that goes with the source.

    Raises:
        ImageryError: no CRS, no even coordinates, or no bands that are red, green and blue.
    """
    import shutil
    import tempfile
    import threading
    import weakref
    from dataclasses import replace

    import numpy as np
    import rioxarray  # noqa: F401  (gives arrays their `.rio`)

    from canopy.imagery.dates import acquisition_date
    from canopy.imagery.files import open_files

    name = str(array.encoding.get("source") or array.attrs.get("imagery") or "DataArray")
    folder = tempfile.mkdtemp(prefix="canopy-")
    try:
        y, x = array.rio.y_dim, array.rio.x_dim
        for axis in (y, x):
            steps = np.diff(array[axis].values.astype(float))
            if axis not in array.coords or not np.allclose(steps, steps.mean(), rtol=0.01):
                raise ValueError(f"no even coordinates {axis}")
        bands = array if array.ndim == 3 else array.expand_dims("band")
        bands = bands.transpose(..., y, x)
        white, labels = bands.attrs.get(WHITE), bands.coords.get(bands.dims[0])
        if bands.dtype.kind == "f":
            # uint8 that was made float to hold NaN is still white at 255; NaN stays what is missing.
            stored = bands.encoding.get("rasterio_dtype") or bands.encoding.get("dtype")
            white, own = 255.0 if str(stored) == "uint8" else white, bands.rio.nodata
            bands = bands.drop_encoding().astype("float32")
            bands = bands.rio.write_nodata(float("nan") if own is None else own)
        if labels is not None and not isinstance(bands.attrs.get("long_name"), (tuple, list)):
            bands = bands.assign_attrs(long_name=[str(label) for label in labels.values])
        day = acquisition_date({key: str(value) for key, value in bands.attrs.items()}, name)
        bands.rio.to_raster(
            f"{folder}/array.tif", tiled=True, compress="ZSTD", zstd_level=1, bigtiff="IF_SAFER",
            photometric="RGB" if len(bands) == 3 else "MINISBLACK", alpha="NO", lock=threading.Lock(),
            tags={"ACQUISITION_DATE": day.isoformat()} if day else {},
        )  # fmt: skip
        options = replace(options, scale=white if options.scale is None else options.scale)
        source = open_files([f"{folder}/array.tif"], options, name=name, label=name)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (CanopyError, KeyboardInterrupt)):
            raise
        raise ImageryError(f"not an image ({error})", where=name, expected=_EXPECTED) from error
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    return source
