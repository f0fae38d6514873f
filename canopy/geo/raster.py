"""Raster: pixels, validity and place together; and the doors to files (reading, warping, writing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rasterio.enums import ColorInterp

from canopy.errors import InputError
from canopy.geo.cog import CogWriter
from canopy.geo.encoding import ENCODINGS, BandSpec
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, raster_env, read_window

if TYPE_CHECKING:
    import xarray


__all__ = [
    "ENCODINGS",
    "BandSpec",
    "CogWriter",
    "Raster",
    "SourcePlace",
    "open_raster",
    "raster_env",
    "read_raster",
    "read_window",
    "write_cog",
]


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

    def to_xarray(self, name: str | None = None) -> xarray.DataArray:
        """As a DataArray (band, y, x) with pixel-centre coordinates, CRS (rioxarray) and NaN as nodata."""
        import rioxarray  # noqa: F401  (registers the .rio accessor)
        import xarray

        px, py = self.grid.pixel
        west, _, _, north = self.grid.bounds
        array = xarray.DataArray(
            np.where(self.valid, self.values, np.float32(np.nan)),
            dims=("band", "y", "x"),
            coords={
                "band": np.arange(1, len(self.values) + 1),
                "y": north - (np.arange(self.grid.height) + 0.5) * py,
                "x": west + (np.arange(self.grid.width) + 0.5) * px,
            },
            name=name,
        )
        array = array.rio.write_crs(self.grid.crs.to_wkt())
        return array.rio.write_transform(self.grid.transform).rio.write_nodata(np.nan, encoded=False)


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


def write_cog(
    path: str | Path,
    raster: Raster,
    bands: Sequence[BandSpec] | None = None,
    *,
    encoding: str = "float32",
    tags: Mapping[str, object] | None = None,
    overwrite: bool = False,
    compress: str = "deflate",
) -> str:
    """Write a whole Raster with `CogWriter` (same rules and errors); returns the file's SHA-256.

    `bands` default to `canopy_height` in metres for one band, `band_1`... for several.
    """
    if bands is None:
        count = len(raster.values)
        bands = [BandSpec("canopy_height" if count == 1 else f"band_{i + 1}") for i in range(count)]
    writer = CogWriter(
        path, raster.grid, bands, encoding=encoding, tags=tags, overwrite=overwrite, compress=compress
    )
    with writer:
        writer.write(raster.values, raster.valid, 0, 0)
    assert writer.sha256 is not None
    return writer.sha256
