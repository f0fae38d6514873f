"""What is checked about an image, and about the options for it, before its pixels are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import rasterio.errors
from affine import Affine
from rasterio.io import DatasetReader
from rasterio.windows import Window

from canopy.errors import ImageryError, InputError
from canopy.geo.crs import ground_crs
from canopy.geo.opening import open_raster
from canopy.sources.bands import BandPlan, parse_bands
from canopy.sources.dates import parse_range
from canopy.sources.imagery import ReadOptions
from canopy.sources.paths import RASTER_SUFFIXES, redact

_COLLAR_PROBE_PX = 16


def check_vrt_sources(dataset: DatasetReader, label: str) -> None:
    """Open every file that a VRT refers to, once.

    GDAL complains about a source that does not open at the first read in a process and gives zeros, valid
    ones, from then on. A source that opens and is damaged inside raises every time.

    Raises:
        ImageryError: a source that does not open, or that lies on another host.
    """
    for name in dataset.files:
        if name.startswith("/vsi"):
            raise ImageryError(
                f"the VRT refers to {redact(name.removeprefix('/vsicurl/'))}",
                where=label,
                expected="local files",
                remedy="give the URLs themselves as images: they are then retried and checked",
            )
        if name == dataset.name or Path(name).suffix.lower() not in RASTER_SUFFIXES:
            continue
        try:
            with open_raster(name, georeferenced=False) as source:
                if source.driver == "VRT":
                    check_vrt_sources(source, label)
        except ImageryError as error:
            raise ImageryError(
                f"the VRT refers to {name}, which is unusable: {error.what}", where=label, remedy=error.remedy
            ) from error


def check_georeference(dataset: DatasetReader, label: str) -> None:
    """Refuse a raster without a geotransform, or with control points or RPCs in its place (ImageryError)."""
    if dataset.transform != Affine.identity():
        return
    if dataset.gcps[0] or dataset.rpcs:
        kind = "ground control points" if dataset.gcps[0] else "rational polynomial coefficients"
        raise ImageryError(
            f"placed only by {kind}",
            where=label,
            expected="a geotransform",
            remedy="orthorectify it first, for example with gdalwarp",
        )
    raise ImageryError(
        "no georeferencing",
        where=label,
        expected="a geotransform (GeoTIFF tags or a world file)",
        remedy="georeference the image first, for example with gdal_translate -a_ullr",
    )


def collar_notes(dataset: DatasetReader, plan: BandPlan, label: str) -> list[str] | None:
    """A warning when the image's rim is one constant colour that nothing declares as missing.

    None when the rim cannot be read: the handle is then of no more use (see `Scene`).

    Looks at eight small windows (corners and middles of the edges); black or white in two of them is a
    collar.
    """
    declared = plan.alpha is not None or dataset.nodatavals[plan.indexes[0] - 1] is not None
    if declared or plan.palette is not None or dataset.mask_flag_enums[0][0].name != "all_valid":
        return []
    px = min(_COLLAR_PROBE_PX, dataset.height, dataset.width)
    rows, cols = ([0, (extent - px) // 2, extent - px] for extent in dataset.shape)
    found: list[float] = []
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            if (i, j) == (1, 1):
                continue
            try:
                values = dataset.read(list(plan.indexes), window=Window(col, row, px, px))
            except rasterio.errors.RasterioError:
                return None  # a damaged block is reported when it is read for its pixels
            if values.min() == values.max() and values.flat[0] in (0, plan.divisor):
                found.append(float(values.flat[0]))
    for value in sorted(set(found)):
        if found.count(value) >= 2:
            return [
                f"{label}: a constant border of {value:g} that is not marked as missing; "
                f"if there is no image there, give --nodata {value:g}"
            ]
    return []


def check_options(options: ReadOptions) -> None:
    """Refuse options that no image could satisfy, before anything is opened.

    Raises:
        InputError: bands, scale, CRS or dates that make no sense.
    """
    parse_bands(options.bands)
    if options.scale is not None and not (np.isfinite(options.scale) and options.scale > 0):
        raise InputError(f"--scale {options.scale}", expected="a positive number: the value of white")
    for crs in (options.crs, options.fallback_crs):
        if crs is not None:
            ground_crs(crs, "--input-crs" if crs is options.crs else "--crs")
    try:
        parse_range(options.datetime)
    except ValueError as error:
        raise InputError(
            str(error), where="--datetime", expected="2021, 2021-07 or 2021-06-01/2021-09-30"
        ) from None
