"""Which bands of a raster are red, green and blue, and what value is white.

Both follow what the file declares (colour interpretation, band descriptions, data type) and what the user
says, never the image's own statistics: a stretch taken from the pixels would make one tile brighter than
the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from canopy.errors import ImageryError, InputError

COLOURS = ("red", "green", "blue")
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
