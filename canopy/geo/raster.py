"""Raster: the pixels, validity and place of a height map together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.enums import ColorInterp

from canopy.errors import InputError
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window


@dataclass(frozen=True, eq=False)
class Raster:
    """values: float32 (bands, h, w); valid: bool (h, w), True = usable; grid: where the pixels are."""

    values: np.ndarray
    valid: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.shape[1:] != self.grid.shape:
            raise InputError(f"values {self.values.shape} on a grid of {self.grid.shape}")
        if self.valid.shape != self.grid.shape or self.valid.dtype != bool:
            raise InputError(
                f"valid {self.valid.dtype} {self.valid.shape} on a grid of {self.grid.shape}", expected="bool"
            )


def read_raster(
    path: str | Path, window: Grid | None = None, *, bands: Sequence[int] | None = None
) -> Raster:
    """A north-up GeoTIFF (any of our encodings, or anybody's map) as float32 in the band's unit.

    Scale and offset are applied; a pixel is valid where every read band is. `window` may be any grid:
    pixels are copied when it shares the file's lattice and resampled otherwise. `bands` are 1-based,
    by default all but an alpha band. Raises ImageryError.
    """
    with open_raster(path) as dataset:
        place = SourcePlace.of(dataset)
        grid = window if window is not None else place.grid()
        colors = enumerate(dataset.colorinterp, 1)
        indexes = list(bands) if bands else [i for i, c in colors if c != ColorInterp.alpha]
        values, valid = read_window(dataset, grid, indexes)
        scales = np.array([dataset.scales[i - 1] for i in indexes])[:, None, None]
        offsets = np.array([dataset.offsets[i - 1] for i in indexes])[:, None, None]
    if (scales != 1).any() or (offsets != 0).any():
        values = np.where(valid, values * scales + offsets, 0).astype(np.float32)
    return Raster(values, valid, grid)
