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
from canopy.sources.bands import BandPlan, parse_bands, sample_values
from canopy.sources.dates import parse_range
from canopy.sources.imagery import ReadOptions
from canopy.sources.paths import RASTER_SUFFIXES, redact

_COLLAR_PROBE_PX = 16
_DARK = 50  # no photograph's brightest pixel is so much darker than white


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


def check_nodata(dataset: DatasetReader, plan: BandPlan, nodata: float | None, label: str) -> None:
    """Refuse a `--nodata` that no pixel can have, which would take nothing out (ImageryError)."""
    kind = np.dtype(dataset.dtypes[plan.indexes[0] - 1])
    if nodata is None or kind.kind not in "iu":
        return
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    if not (least <= nodata <= most and float(nodata).is_integer()):
        raise ImageryError(
            f"no pixel of {kind} can be {nodata:g}",
            where=label,
            expected=f"--nodata with a whole number from {least} to {most}",
        )


def collar_notes(
    dataset: DatasetReader, plan: BandPlan, label: str, nodata: float | None = None
) -> list[str] | None:
    """A warning when the image's rim is one constant colour that nothing declares as missing.

    None when the rim cannot be read: the handle is then of no more use (see `Scene`). `nodata` is what the
    user declared in place of the file.

    Looks at eight small windows (corners and middles of the edges); black or white in two of them is a
    collar.
    """
    flags = dataset.mask_flag_enums[plan.indexes[0] - 1][0].name
    if plan.alpha is not None or plan.palette is not None or flags not in ("all_valid", "nodata"):
        return []
    missing = dataset.nodatavals[plan.indexes[0] - 1] if nodata is None else nodata
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
            if values.min() == values.max() and values.flat[0] in {0, plan.divisor} - {missing}:
                found.append(float(values.flat[0]))
    for value in sorted(set(found)):
        if found.count(value) >= 2:
            return [
                f"{label}: a constant border of {value:g} that is not marked as missing; "
                f"if there is no image there, give --nodata {value:g}"
            ]
    return []


def radiometry_notes(dataset: DatasetReader, plan: BandPlan, label: str) -> list[str] | None:
    """Warnings where pixels carry a scale of their own or no colour, and where all are black or white.

    None when they cannot be read, as in `collar_notes`.
    """
    notes = []
    if any((dataset.scales[i - 1], dataset.offsets[i - 1]) != (1.0, 0.0) for i in plan.indexes):
        notes.append(
            f"{label}: its scale and offset tags are not applied; white is counted in stored values "
            "(gdal_translate -unscale applies them)"
        )
    try:
        if len(plan.indexes) == 3 and _is_grey(dataset, plan):
            notes.append(f"{label}: its red, green and blue are equal: heights of grey images are wrong")
        if dataset.dtypes[plan.indexes[0] - 1] == "uint8":
            return notes
        values = sample_values(dataset, plan.indexes)
    except rasterio.errors.RasterioError:
        return None
    white = f"--scale {plan.divisor:g}"
    if values.size and float(values.max()) < plan.divisor / _DARK:
        notes.append(f"{label}: all but black: no value above {float(values.max()):g} where {white} is white")
    elif values.size and float(np.median(values)) >= plan.divisor:
        notes.append(f"{label}: all but white: half of the values reach {white}")
    return notes


def _is_grey(dataset: DatasetReader, plan: BandPlan) -> bool:
    """Whether the middle of an image has structure and no colour."""
    px = min(4 * _COLLAR_PROBE_PX, dataset.height, dataset.width)
    row, col = ((extent - px) // 2 for extent in dataset.shape)
    red, *others = dataset.read(list(plan.indexes), window=Window(col, row, px, px))
    return bool(red.min() < red.max() and all(np.array_equal(red, other) for other in others))


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
