"""`--radiometry`: the image's own percentiles, measured once per scene, moved onto the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import output_crs
from canopy.models.height import Stretch, parse_radiometry

if TYPE_CHECKING:
    from canopy.imagery.base import ImagerySource
    from canopy.models.height import HeightModel


# A lattice of small windows at the model's scale: what the network sees, a million pixels at most.
_WINDOWS, _WINDOW_PX = 8, 128
_DIGITS = 5  # what the tags record, so that the recorded numbers reproduce the map


def with_radiometry(
    model: HeightModel, source: ImagerySource, requested: AOI, wish: str
) -> tuple[HeightModel, str, list[str]]:
    """The model with the stretch that `--radiometry` asks for.

    The percentiles are those of all of the source, whatever part of it is mapped, so that a pixel's height
    does not depend on how the area is cut. Only where a source has no extent of its own (web tiles, searches)
    are they those of the requested area; a note then gives the numbers that fix them for other areas.

    Returns:
        The model (its weights shared), the stretch for the tags or `none`, and notes for the user.

    Raises:
        ConfigError: `wish` cannot be read.
        InputError: a model without stored percentiles, or imagery without pixels or contrast.
    """
    parsed = parse_radiometry(wish)
    if parsed is None:
        return model, "none", []
    measured, target = parsed[0], parsed[1] or model.config.percentiles
    if not target:
        raise InputError(
            "this model's file has no percentiles to match",
            where=f"--radiometry {wish}",
            remedy="give the six target percentiles r5,r95,g5,g95,b5,b95",
        )
    notes: list[str] = []
    if measured is None:
        whole = source.area() if source.has_own_extent else None
        measured = scene_percentiles(source, whole or requested, model.config.gsd_m)
        if whole is None:
            numbers = ",".join(f"{v:g}" for v in (*measured, *target))
            notes.append(
                "the imagery has no extent of its own, so its percentiles were measured over this area; "
                f"for neighbouring areas use --radiometry {numbers}"
            )
    stretch = Stretch(measured, tuple(target))
    return model.with_radiometry(stretch), stretch.describe(), notes


def scene_percentiles(source: ImagerySource, area: AOI, gsd_m: float) -> tuple[float, ...]:
    """5th and 95th percentile of each band over `area`: r5, r95, g5, g95, b5, b95, in 0..1.

    Measured on a regular lattice of windows at `gsd_m`; the same numbers every time.

    Raises:
        ImageryError: no valid pixel there.
    """
    grid = area.grid(output_crs(area.lonlat, source.native_crs), gsd_m)
    pixels = []
    for row in _starts(grid.height):
        for col in _starts(grid.width):
            height, width = min(_WINDOW_PX, grid.height - row), min(_WINDOW_PX, grid.width - col)
            imagery = source.read(grid.window(row, col, height, width))
            # Pure black is a collar that nobody declared far more often than it is a colour.
            valid = imagery.valid & np.isfinite(imagery.rgb).all(axis=0) & imagery.rgb.any(axis=0)
            pixels.append(imagery.rgb[:, valid])
    values = np.concatenate(pixels, axis=1)
    if values.shape[1] == 0:
        raise ImageryError("no valid pixel to measure its colours on", where=source.name)
    measured = np.percentile(values.astype(np.float64), (5, 95), axis=1).T.ravel()
    return tuple(float(f"{v:.{_DIGITS}g}") for v in measured)


def _starts(length: int) -> list[int]:
    """First pixels of the windows along one side: evenly spread, never overlapping."""
    count = max(1, min(_WINDOWS, length // _WINDOW_PX))
    return [int(start) for start in np.linspace(0, max(0, length - _WINDOW_PX), count)]
