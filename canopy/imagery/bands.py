"""Which bands of a raster are red, green and blue, what value is white, and what is checked about an image.

Bands and white follow what the file declares (colour interpretation, band descriptions, data type) and what
the user says, never the image's own statistics: a stretch taken from the pixels would make one tile brighter
than the next.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rasterio.dtypes import in_dtype_range
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader
from rasterio.windows import Window

from canopy.errors import ImageryError, InputError
from canopy.files import redact
from canopy.geo.collar import frame_windows
from canopy.geo.crs import ground_crs
from canopy.geo.reading import alpha_bands
from canopy.imagery.base import COLOURS, ReadOptions
from canopy.imagery.dates import parse_range

# How files write the colours, in lower case; colour interpretations have the first names.
_NAMES = {
    "red": ("red", "r", "band_red", "red_band", "visible_red"),
    "green": ("green", "g", "band_green", "green_band", "visible_green"),
    "blue": ("blue", "b", "band_blue", "blue_band", "visible_blue"),
}
_UNSEEN = ("nir", "ir", "infrared", "near_infrared", "nearinfrared", "nir_band", "band_nir", "red_edge")
_LIKELY_WHITES = (1.0, 255.0, 1023.0, 2047.0, 4095.0, 10000.0, 16383.0, 65535.0)


@dataclass(frozen=True)
class BandPlan:
    """How to turn one raster's bands into RGB in 0..1.

    Attributes:
        indexes: 1-based band numbers; (red, green, blue), or the one palette band.
        palette: uint8 (256, 4) RGBA table when the raster is paletted, else None.
        divisor: pixel value that means white; RGB = value / divisor, clipped to 0..1.
        notes: what the user should know about the choice.
    """

    indexes: tuple[int, ...]
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
    dataset: DatasetReader,
    *,
    where: str,
    bands: str | Sequence[int] | None = None,
    scale: float | None = None,
    single: bool = False,
) -> BandPlan:
    """Decide bands and radiometric scaling of an open raster.

    Args:
        dataset: open for reading.
        where: the file's name for messages.
        bands: band numbers of red, green and blue; overrides what the file declares.
        scale: pixel value that means white; required for everything but uint8.
        single: the file is one colour of a set: its first band is meant.

    Raises:
        ImageryError: grey, ambiguous, or of a type that needs an explicit scale.
    """
    if single:
        return BandPlan((1,), None, _divisor(dataset, (1,), scale, where))
    wanted = parse_bands(bands)
    if wanted is None and dataset.count == 1 and dataset.colorinterp[0] == ColorInterp.palette:
        return _palette_plan(dataset, where)
    notes: list[str] = []
    if wanted is None:
        wanted = declared_bands(dataset, where, notes)
    elif max(wanted) > dataset.count:
        raise InputError(
            f"--bands {','.join(map(str, wanted))} asks for band {max(wanted)}",
            where=where,
            expected=f"numbers from 1 to {dataset.count}",
        )
    divisor = _divisor(dataset, wanted, scale, where)
    for alpha in alpha_bands(dataset)[:1]:
        notes.append(f"{where}: band {alpha} is alpha: not used as colour; alpha 0 means no image")
        if any(dataset.nodatavals[index - 1] is not None for index in wanted):
            notes.append(f"{where}: both alpha and a nodata value: only pixels that both call valid are used")
    return BandPlan(wanted, None, divisor, tuple(notes))


def declared_bands(dataset: DatasetReader, where: str, notes: list[str]) -> tuple[int, int, int]:
    """Numbers of red, green and blue by what the file declares; `notes` takes what to tell of the choice.

    Raises:
        ImageryError: it declares nothing that can be relied on.
    """
    colours = [colour.name for colour in dataset.colorinterp]
    labels = [text or colour for text, colour in zip(dataset.descriptions, colours, strict=True)]
    names = [re.sub(r"[^a-z]+", "_", str(text or "").lower()).strip("_") for text in dataset.descriptions]
    declared, described = find_rgb(colours), find_rgb(names)
    if declared and any(
        names[index - 1] in _UNSEEN or _colour_of(names[index - 1]) not in (None, colour)
        for colour, index in zip(COLOURS, declared, strict=True)
    ):
        # GDAL calls the first three bands of any uint8 file red, green and blue if nobody says otherwise.
        given = ",".join(map(str, described or declared))
        raise ImageryError(
            f"bands {', '.join(map(str, declared))} are red, green, blue by colour interpretation, "
            f"but are described as {', '.join(labels[index - 1] for index in declared)}",
            where=where,
            remedy=f"say which are meant with --bands R,G,B, such as --bands {given}",
        )
    if declared or described:
        return declared or described  # type: ignore[return-value]
    usable = [i for i, colour in enumerate(dataset.colorinterp, 1) if colour != ColorInterp.alpha]
    if len(usable) < 3:
        raise ImageryError(
            f"{len(usable)} colour band{'' if len(usable) == 1 else 's'} (grey or single-channel)",
            where=where,
            expected="red, green and blue bands",
            remedy="give a colour image",
        )
    undeclared = (ColorInterp.undefined, ColorInterp.gray)
    if len(usable) == 3 and all(dataset.colorinterp[index - 1] in undeclared for index in usable):
        notes.append(
            f"{where}: no colour interpretation: bands {usable} taken as red, green, blue (--bands to change)"
        )
        return usable[0], usable[1], usable[2]
    listed = ", ".join(f"{index} {label}" for index, label in enumerate(labels, 1))
    raise ImageryError(
        f"cannot tell red, green and blue among {dataset.count} bands ({listed})",
        where=where,
        expected="colour interpretation or band descriptions",
        remedy="say which with --bands R,G,B, such as --bands 1,2,3",
    )


def _colour_of(name: str) -> str | None:
    return next((colour for colour, names in _NAMES.items() if name in names), None)


def find_rgb(labels: Sequence[str]) -> tuple[int, int, int] | None:
    """Band numbers of red, green and blue among lower-case labels; None unless each is there once."""
    colours = [_colour_of(label) for label in labels]
    if any(colours.count(colour) != 1 for colour in COLOURS):
        return None
    return colours.index("red") + 1, colours.index("green") + 1, colours.index("blue") + 1


def _palette_plan(dataset: DatasetReader, where: str) -> BandPlan:
    if dataset.dtypes[0] != "uint8":
        raise ImageryError(
            f"a {dataset.dtypes[0]} palette", where=where, expected="uint8", remedy="expand it to RGB first"
        )
    table = np.zeros((256, 4), np.uint8)
    for value, rgba in dataset.colormap(1).items():
        table[value] = rgba
    if (table[:, :3] == table[:, :1]).all():
        raise ImageryError("a palette of greys", where=where, expected="colour", remedy="give a colour image")
    return BandPlan((1,), table, 255.0, (f"{where}: palette expanded to RGB",))


def _divisor(dataset: DatasetReader, indexes: tuple[int, ...], scale: float | None, where: str) -> float:
    types = {dataset.dtypes[index - 1] for index in indexes}
    if len(types) > 1:
        raise ImageryError(
            f"colour bands of different types ({', '.join(sorted(types))})", where=where, expected="one type"
        )
    kind = types.pop()
    if "complex" in kind:
        raise ImageryError(f"{kind} pixels", where=where, expected="uint8 colour")
    if scale is not None:
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


def sample_values(dataset: DatasetReader, indexes: Sequence[int]) -> NDArray[np.float64]:
    """Finite, valid values of a bounded sample of the bands, (n,); for messages only."""
    if dataset.overviews(indexes[0]):
        shape = (max(1, 1024 * extent // max(dataset.shape)) for extent in dataset.shape)
        values = dataset.read(list(indexes), out_shape=(len(indexes), *shape), masked=True)
    else:
        values = dataset.read(list(indexes), window=_middle(dataset, 1024), masked=True)
    return np.ma.masked_invalid(values).compressed().astype(np.float64)


def _middle(dataset: DatasetReader, side: int) -> Window:
    height, width = (min(side, extent) for extent in dataset.shape)
    return Window((dataset.width - width) // 2, (dataset.height - height) // 2, width, height)


_GREY_COUNTS, _BEYOND_WHITE = 2, 4
GREY = "{}: its red, green and blue are equal: heights of grey images are wrong"
_PARTIAL = 0.05  # of the pixels, beyond a feathered edge
_DARK = 50  # no photograph's brightest pixel is so much darker than white


def check_local(dataset: DatasetReader, label: str) -> None:
    """Refuse a VRT of files on other hosts, where nothing would be tried again (ImageryError)."""
    for name in dataset.files if dataset.driver == "VRT" else ():
        if name.startswith("/vsi"):
            raise ImageryError(
                f"the VRT refers to {redact(name.removeprefix('/vsicurl/'))}",
                where=label,
                expected="local files",
                remedy="give the URLs themselves as images: they are then retried and checked",
            )


def check_nodata(dataset: DatasetReader, plan: BandPlan, nodata: float | None, label: str) -> None:
    """Refuse a `--nodata` that no pixel can have, which would take nothing out (ImageryError)."""
    kind = dataset.dtypes[plan.indexes[0] - 1]
    if nodata is None or np.dtype(kind).kind == "f":
        return
    if not (in_dtype_range(nodata, kind) and float(nodata).is_integer()):
        info = np.iinfo(kind)
        raise ImageryError(
            f"no pixel of {kind} can be {nodata:g}",
            where=label,
            expected=f"--nodata with a whole number from {info.min} to {info.max}",
        )


def no_colour(values: np.ndarray, white: float) -> NDArray[np.bool_]:
    """Where all bands (3, h, w) share a number that no brightness is: below 0, or far beyond white.

    Such as -9999, -3.4e38 or 65535: nodata values that the file does not declare.
    """
    equal: NDArray[np.bool_] = (values[1:] == values[:1]).all(axis=0)
    return equal & ((values[0] < 0) | (values[0] > _BEYOND_WHITE * white))


def is_grey(values: np.ndarray, white: float) -> bool:
    """Whether (3, ...) is grey: bands that differ by no more than compression with loss makes them."""
    near = white * _GREY_COUNTS / 255
    apart = (np.abs(values[0].astype(np.float64) - other).max() for other in values[1:])
    return bool(np.ptp(values[0]) > 2 * near and all(most <= near for most in apart))


def pixel_notes(dataset: DatasetReader, plan: BandPlan, label: str) -> list[str]:
    """Warnings about a few pixels of an image.

    Told of are pixels with a scale of their own, and an image without colour or that is all black or white.
    """
    notes, bands = [], list(plan.indexes)
    for alpha in alpha_bands(dataset)[:1]:
        values = dataset.read(alpha, window=_middle(dataset, 1024))
        partial = (
            float(((values > 0) & (values < np.iinfo(values.dtype).max)).mean())
            if values.dtype.kind == "u"
            else 0.0
        )
        if partial > _PARTIAL:
            colours = ",".join(c.name for c in dataset.colorinterp).replace("alpha", "undefined")
            notes.append(
                f"{label}: in {partial:.0%} of the pixels alpha is neither 0 nor full; they count as image; "
                f"if band {alpha} is near infrared: rio edit-info --colorinterp {colours} FILE"
            )
    if any((dataset.scales[i - 1], dataset.offsets[i - 1]) != (1.0, 0.0) for i in bands):
        notes.append(
            f"{label}: its scale and offset tags are not applied; white is counted in stored values "
            "(gdal_translate -unscale applies them)"
        )
    if len(bands) == 3:
        if is_grey(dataset.read(bands, window=_middle(dataset, 64)), plan.divisor):
            notes.append(GREY.format(label))
        if dataset.dtypes[bands[0] - 1] != "uint8":
            seen = (dataset.read(bands, window=window) for window in frame_windows(dataset))
            odd = [values[0][no_colour(values, plan.divisor)] for values in seen]
            notes += [
                f"{label}: pixels of {value:.6g} in all bands, which is no brightness, are missing"
                for value in np.unique(np.concatenate(odd))[:1]
            ]
    if dataset.dtypes[bands[0] - 1] != "uint8":
        values, white = sample_values(dataset, bands), f"--scale {plan.divisor:g}"
        if values.size and values.max() < plan.divisor / _DARK:
            notes.append(f"{label}: all but black: no value above {values.max():g} where {white} is white")
        elif values.size and np.median(values) >= plan.divisor:
            notes.append(f"{label}: all but white: half of the values reach {white}")
    return notes


def collar_notes(dataset: DatasetReader, plan: BandPlan, label: str, nodata: float | None) -> list[str]:
    """A warning about a border of black or white, in two places of the frame, that nothing calls missing.

    `nodata` is what the user declared in place of the file.
    """
    flags = dataset.mask_flag_enums[plan.indexes[0] - 1][0].name
    if plan.palette is not None or flags not in ("all_valid", "nodata"):
        return []
    missing = dataset.nodatavals[plan.indexes[0] - 1] if nodata is None else nodata
    found = Counter[float]()
    for window in frame_windows(dataset):
        values = dataset.read(list(plan.indexes), window=window)
        if values.min() == values.max() and values.flat[0] in {0, plan.divisor} - {missing}:
            found[float(values.flat[0])] += 1
    return [
        f"{label}: a constant border of {value:g} that is not marked as missing; "
        f"if there is no image there, give --nodata {value:g}"
        for value, count in sorted(found.items())
        if count >= 2
    ][:1]


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
