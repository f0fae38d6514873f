"""The one rule for height rasters of any origin: which band is the height, what its numbers are in metres,
and which heights are none. Every command that reads heights takes it from here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader

from canopy.errors import ImageryError
from canopy.files import public_name
from canopy.geo.units import band_unit

# Heights beyond these are no trees: an undeclared nodata value, a bird, a pylon.
LOWEST_M, HIGHEST_M = -50.0, 150.0
# What files write where nothing is known.
_NODATA = (-9999, -99999, -32768, -32767)
_SAYS_HEIGHT = re.compile(r"(?<![a-z])chm(?![a-z])|canopy[\s_-]*height", re.IGNORECASE)


@dataclass(frozen=True)
class HeightBands:
    """The bands of a height raster.

    Attributes:
        indexes: 1-based: the height, and its lower and upper bound where there are.
        scale, offset: what makes metres of each band's numbers.
        step_m: what heights are rounded to; 0: nothing.
        unit: what the file says, where that is not metres.
    """

    indexes: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    step_m: float
    unit: str | None

    def metres(self, raw: np.ndarray) -> np.ndarray:
        """float32 (b, h, w) metres of the first b bands as they are stored."""
        scale, offset = (np.array(x[: len(raw)])[:, None, None] for x in (self.scale, self.offset))
        # In millimetres -9999 would be -10 m: a nodata value stays the number it is, which is no height.
        missing = np.isin(raw, _NODATA)
        if raw.dtype.kind == "u" and raw.dtype.itemsize > 1:
            missing |= raw == np.iinfo(raw.dtype).max
        with np.errstate(over="ignore"):  # of an undeclared nodata value
            return np.where(missing, raw, raw * scale + offset).astype(np.float32)


def height_bands(dataset: DatasetReader, wanted: int | str | None = None, unit_m: float = 1.0) -> HeightBands:
    """Which bands of a raster are the height and the ends of its interval, and what makes metres of them.

    Args:
        dataset: open for reading.
        wanted: number (from 1) or name of the height's band; by default the only one, or the only one that
            says canopy height or CHM.
        unit_m: metres per unit of a file that says neither a unit nor a scale.

    Raises:
        ImageryError: no such band, a colour image, several bands; see also `band_unit`.
    """
    names = [(text or "").strip() for text in dataset.descriptions]
    indexes = (height := _height_band(dataset, names, wanted),)
    if names[height - 1] == "canopy_height" and {"height_lower", "height_upper"} <= set(names):
        indexes += (names.index("height_lower") + 1, names.index("height_upper") + 1)  # type: ignore[assignment]
    silent_m = unit_m if dataset.scales[height - 1] == 1 else 1.0
    unit, metres = band_unit(dataset, height) or (f"{silent_m:g} m", silent_m)
    scale, offset = (
        tuple(float(numbers[b - 1]) * metres for b in indexes)
        for numbers in (dataset.scales, dataset.offsets)
    )
    step_m = abs(scale[0]) if np.dtype(dataset.dtypes[height - 1]).kind in "iu" else 0.0
    return HeightBands(indexes, scale, offset, step_m, unit if metres != 1 else None)


def _height_band(dataset: DatasetReader, names: list[str], wanted: int | str | None) -> int:
    where = public_name(dataset.name)
    listed = ", ".join(f"{i} {name}".strip() for i, name in enumerate(names[:12], 1))
    if wanted is not None:
        text = str(wanted).strip()
        found = [i for i, name in enumerate(names, 1) if name and name.lower() == text.lower()]
        if not found and text.isdecimal() and 1 <= int(text) <= len(names):
            found = [int(text)]
        if len(found) != 1:
            raise ImageryError(f"no band {text!r}", where=where, expected=f"--band with one of {listed}")
        return found[0]
    usable = [i for i, colour in enumerate(dataset.colorinterp, 1) if colour != ColorInterp.alpha]
    telling = [i for i in usable if _SAYS_HEIGHT.search(names[i - 1])]
    if "canopy_height" in names:
        return names.index("canopy_height") + 1
    if {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= set(dataset.colorinterp):
        raise ImageryError("a colour image", where=where, expected="a canopy height map in metres")
    if len(usable) == 1 or len(telling) == 1:
        return usable[0] if len(usable) == 1 else telling[0]
    raise ImageryError(
        f"holds {len(names)} bands ({listed})",
        where=where,
        expected="one band, or one that says canopy height or CHM",
        remedy="name the height's with --band NUMBER or --band NAME",
    )
