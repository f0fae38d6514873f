"""Which bands of a raster are red, green and blue, what value is white, and what is checked about an image.

Bands and white follow what the file declares (colour interpretation, band descriptions, data type) and what
the user says, never the image's own statistics: a stretch taken from the pixels would make one tile brighter
than the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import rasterio.errors
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader
from rasterio.windows import Window

from canopy.errors import ImageryError, InputError
from canopy.files import RASTER_SUFFIXES, redact
from canopy.geo.crs import ground_crs
from canopy.geo.reading import open_raster
from canopy.imagery.base import COLOURS, ReadOptions
from canopy.imagery.names import parse_range

_BY_DESCRIPTION = {
    "red": ("red", "r", "band_red", "red_band", "visible_red"),
    "green": ("green", "g", "band_green", "green_band", "visible_green"),
    "blue": ("blue", "b", "band_blue", "blue_band", "visible_blue"),
}
_UNSEEN = ("nir", "ir", "infrared", "near_infrared", "nearinfrared", "nir_band", "band_nir", "red_edge")
_UNDECLARED = (ColorInterp.undefined, ColorInterp.gray)
_LIKELY_WHITES = (1.0, 255.0, 1023.0, 2047.0, 4095.0, 10000.0, 16383.0, 65535.0)


@dataclass(frozen=True)
class BandPlan:
    """How to turn one raster's bands into RGB in 0..1.

    Attributes:
        indexes: 1-based band numbers; (red, green, blue), or the one palette band.
        alpha: 1-based number of the alpha band, or None.
        palette: uint8 (256, 4) RGBA table when the raster is paletted, else None.
        divisor: pixel value that means white; RGB = value / divisor, clipped to 0..1.
        notes: what the user should know about the choice.
    """

    indexes: tuple[int, ...]
    alpha: int | None
    palette: NDArray[np.uint8] | None
    divisor: float
    notes: tuple[str, ...] = ()


def parse_bands(bands: str | Sequence[int] | None) -> tuple[int, int, int] | None:
    """`"4,3,2"` or three numbers -> 1-based band numbers of red, green and blue.

    Raises:
        InputError: not three different positive integers.
    """
    if bands is None:
        return None
    try:
        parts = [part for part in re.split(r"[,\s]+", bands.strip())] if isinstance(bands, str) else bands
        numbers = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or len(set(numbers)) != 3 or min(numbers) < 1:
        raise InputError(
            f"cannot use {bands!r} as bands",
            where="--bands",
            expected="three different band numbers for red, green, blue, counted from 1, such as 1,2,3",
        )
    return numbers[0], numbers[1], numbers[2]


def plan_bands(
    dataset: rasterio.DatasetReader,
    *,
    where: str,
    bands: str | Sequence[int] | None = None,
    scale: float | None = None,
) -> BandPlan:
    """Decide bands and radiometric scaling of an open raster.

    Args:
        dataset: open for reading.
        where: the file's name for messages.
        bands: band numbers of red, green and blue; overrides what the file declares.
        scale: pixel value that means white; required for everything but uint8.

    Raises:
        ImageryError: grey, ambiguous, or of a type that needs an explicit scale.
    """
    wanted = parse_bands(bands)
    if wanted is None and dataset.count == 1 and dataset.colorinterp[0] == ColorInterp.palette:
        return _palette_plan(dataset, where)
    indexes, alpha, notes = _choose(dataset, wanted, where)
    if any(dataset.colorinterp[index - 1] == ColorInterp.palette for index in indexes):
        raise ImageryError("a paletted band among several", where=where, remedy="expand the palette first")
    divisor = _divisor(dataset, indexes, scale, where)
    if alpha is not None:
        notes.append(f"{where}: band {alpha} is alpha: not used as colour; alpha 0 means no image")
        if any(dataset.nodatavals[index - 1] is not None for index in indexes):
            notes.append(f"{where}: both alpha and a nodata value: only pixels that both call valid are used")
    return BandPlan(indexes, alpha, None, divisor, tuple(notes))


def plan_single(dataset: rasterio.DatasetReader, *, where: str, scale: float | None = None) -> BandPlan:
    """Plan for a file that is one colour of a set: its first band. Raises as `plan_bands` does."""
    return BandPlan((1,), None, None, _divisor(dataset, (1,), scale, where))


def _choose(
    dataset: rasterio.DatasetReader, wanted: tuple[int, int, int] | None, where: str
) -> tuple[tuple[int, int, int], int | None, list[str]]:
    colours = dataset.colorinterp
    alphas = [index for index, colour in enumerate(colours, 1) if colour == ColorInterp.alpha]
    alpha = alphas[0] if len(alphas) == 1 and dataset.count > 1 else None
    if wanted is not None:
        if max(wanted) > dataset.count:
            raise InputError(
                f"--bands {','.join(map(str, wanted))} asks for band {max(wanted)}",
                where=where,
                expected=f"numbers from 1 to {dataset.count}",
            )
        return wanted, alpha if alpha not in wanted else None, []
    declared = _by_interpretation(colours)
    described = _by_description(dataset.descriptions)
    if declared and _denied(dataset.descriptions, declared):
        # GDAL calls the first three bands of any uint8 file red, green and blue if nobody says otherwise.
        given = ",".join(map(str, described or declared))
        raise ImageryError(
            f"bands {', '.join(map(str, declared))} are red, green, blue by colour interpretation, "
            f"but are described as {', '.join(_band_label(dataset, index) for index in declared)}",
            where=where,
            remedy=f"say which are meant with --bands R,G,B, such as --bands {given}",
        )
    if declared or described:
        return declared or described, alpha, []  # type: ignore[return-value]
    usable = [index for index in range(1, dataset.count + 1) if index not in alphas]
    if len(usable) < 3:
        raise ImageryError(
            f"{len(usable)} colour band{'' if len(usable) == 1 else 's'} (grey or single-channel)",
            where=where,
            expected="red, green and blue bands",
            remedy="give a colour image",
        )
    undeclared = all(colours[index - 1] in _UNDECLARED for index in usable)
    if len(usable) == 3 and undeclared:
        note = (
            f"{where}: no colour interpretation: bands {usable} taken as red, green, blue (--bands to change)"
        )
        return (usable[0], usable[1], usable[2]), alpha, [note]
    listed = ", ".join(f"{index} {_band_label(dataset, index)}" for index in range(1, dataset.count + 1))
    raise ImageryError(
        f"cannot tell red, green and blue among {dataset.count} bands ({listed})",
        where=where,
        expected="colour interpretation or band descriptions",
        remedy="say which with --bands R,G,B, such as --bands 1,2,3",
    )


def _by_interpretation(colours: Sequence[ColorInterp]) -> tuple[int, int, int] | None:
    found = [[i for i, c in enumerate(colours, 1) if c == ColorInterp[name]] for name in COLOURS]
    return (found[0][0], found[1][0], found[2][0]) if all(len(f) == 1 for f in found) else None


def _names(descriptions: Sequence[str | None]) -> list[str]:
    return [re.sub(r"[^a-z]+", "_", (text or "").strip().lower()).strip("_") for text in descriptions]


def _denied(descriptions: Sequence[str | None], declared: Sequence[int]) -> bool:
    """Whether a band's description names another colour than the one that it is declared to be."""
    names = _names(descriptions)
    for colour, index in zip(COLOURS, declared, strict=True):
        others = {name for other in COLOURS if other != colour for name in _BY_DESCRIPTION[other]}
        if names[index - 1] in others | set(_UNSEEN):
            return True
    return False


def _by_description(descriptions: Sequence[str | None]) -> tuple[int, int, int] | None:
    names = _names(descriptions)
    found = [[i for i, name in enumerate(names, 1) if name in _BY_DESCRIPTION[colour]] for colour in COLOURS]
    return (found[0][0], found[1][0], found[2][0]) if all(len(f) == 1 for f in found) else None


def _band_label(dataset: rasterio.DatasetReader, index: int) -> str:
    return dataset.descriptions[index - 1] or dataset.colorinterp[index - 1].name


def _palette_plan(dataset: rasterio.DatasetReader, where: str) -> BandPlan:
    if dataset.dtypes[0] != "uint8":
        raise ImageryError(
            f"a {dataset.dtypes[0]} palette", where=where, expected="uint8", remedy="expand it to RGB first"
        )
    table = np.zeros((256, 4), np.uint8)
    for value, rgba in dataset.colormap(1).items():
        if 0 <= value < 256:
            table[value] = rgba
    if (table[:, 0] == table[:, 1]).all() and (table[:, 1] == table[:, 2]).all():
        raise ImageryError("a palette of greys", where=where, expected="colour", remedy="give a colour image")
    return BandPlan((1,), None, table, 255.0, (f"{where}: palette expanded to RGB",))


def _divisor(
    dataset: rasterio.DatasetReader, indexes: tuple[int, ...], scale: float | None, where: str
) -> float:
    types = {dataset.dtypes[index - 1] for index in indexes}
    if len(types) > 1:
        raise ImageryError(
            f"colour bands of different types ({', '.join(sorted(types))})", where=where, expected="one type"
        )
    kind = types.pop()
    if "complex" in kind:
        raise ImageryError(f"{kind} pixels", where=where, expected="uint8 colour")
    if scale is not None:
        if not (np.isfinite(scale) and scale > 0):
            raise InputError(
                f"--scale {scale}", where=where, expected="a positive number: the value of white"
            )
        return float(scale)
    if kind == "uint8":
        return 255.0
    values = sample_values(dataset, indexes)
    largest = float(values.max()) if values.size else None
    seen = "" if largest is None else f" with values up to {largest:g}"
    white = next((w for w in _LIKELY_WHITES if largest is not None and largest <= w), 10000.0)
    raise ImageryError(
        f"{kind} pixels{seen}: how bright is white?",
        where=where,
        expected="uint8, or an explicit scale",
        remedy=f"give the value that means white, for example --scale {white:g}",
    )


def sample_values(dataset: rasterio.DatasetReader, indexes: Sequence[int]) -> NDArray[np.float64]:
    """Finite, valid values of a bounded sample of the bands, (n,); for messages only."""
    side = 1024
    if dataset.overviews(indexes[0]) or max(dataset.shape) <= 2 * side:
        step = max(1.0, max(dataset.shape) / side)
        shape = (len(indexes), max(1, int(dataset.height / step)), max(1, int(dataset.width / step)))
        values = dataset.read(list(indexes), out_shape=shape, masked=True)
    else:
        row, col = (max(0, (extent - side) // 2) for extent in dataset.shape)
        window = Window(col, row, min(side, dataset.width), min(side, dataset.height))
        values = dataset.read(list(indexes), window=window, masked=True)
    return np.ma.masked_invalid(values).compressed().astype(np.float64)


GREY = "{}: its red, green and blue are equal: heights of grey images are wrong"
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


def pixel_notes(
    dataset: DatasetReader, plan: BandPlan, label: str, nodata: float | None = None
) -> list[str] | None:
    """Warnings about a few pixels of an image; `nodata` is what the user declared in place of the file.

    None when they cannot be read: the handle is then of no more use (see `Scene`), and a damaged block is
    reported when it is read for its pixels.
    """
    try:
        return _radiometry_notes(dataset, plan, label) + _collar_notes(dataset, plan, label, nodata)
    except rasterio.errors.RasterioError:
        return None


def _collar_notes(dataset: DatasetReader, plan: BandPlan, label: str, nodata: float | None) -> list[str]:
    """A warning when the image's rim is one constant colour that nothing declares as missing.

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
            values = dataset.read(list(plan.indexes), window=Window(col, row, px, px))
            if values.min() == values.max() and values.flat[0] in {0, plan.divisor} - {missing}:
                found.append(float(values.flat[0]))
    for value in sorted(set(found)):
        if found.count(value) >= 2:
            return [
                f"{label}: a constant border of {value:g} that is not marked as missing; "
                f"if there is no image there, give --nodata {value:g}"
            ]
    return []


def _radiometry_notes(dataset: DatasetReader, plan: BandPlan, label: str) -> list[str]:
    """Warnings where pixels carry a scale of their own or no colour, and where all are black or white."""
    notes = []
    if any((dataset.scales[i - 1], dataset.offsets[i - 1]) != (1.0, 0.0) for i in plan.indexes):
        notes.append(
            f"{label}: its scale and offset tags are not applied; white is counted in stored values "
            "(gdal_translate -unscale applies them)"
        )
    if len(plan.indexes) == 3 and _is_grey(dataset, plan):
        notes.append(GREY.format(label))
    if dataset.dtypes[plan.indexes[0] - 1] == "uint8":
        return notes
    values = sample_values(dataset, plan.indexes)
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
