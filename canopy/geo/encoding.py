"""How metres are stored in a map file: float32, or two compact whole-number encodings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from canopy.errors import InputError


@dataclass(frozen=True)
class BandSpec:
    """Name and unit of an output band.

    `scale` is the unit's worth of one stored step in the compact encodings; None takes the encoding's
    own for metres and 1 for other units (days, classes). float32 files are never scaled.
    """

    name: str
    unit: str = "m"
    scale: float | None = None


@dataclass(frozen=True)
class Encoding:
    """dtype, nodata, step in metres, and the largest storable step (nodata lies above it)."""

    name: str
    dtype: str
    nodata: float
    step_m: float
    top: int

    def scale_of(self, band: BandSpec) -> float:
        """Worth of one stored step of a band."""
        if self.dtype == "float32":
            return 1.0
        if band.scale is not None:
            return band.scale
        return self.step_m if band.unit == "m" else 1.0

    def encode(self, values: np.ndarray, valid: np.ndarray, scales: list[float]) -> np.ndarray:
        """float32 (b, h, w) and valid (h, w) -> stored numbers; invalid pixels become nodata.

        Compact steps are rounded half to even and clipped to 0..top: a valid height is never nodata.
        """
        if self.dtype == "float32":
            return np.where(valid, values, np.float32(np.nan)).astype(np.float32, copy=False)
        factors = np.asarray(scales, dtype=np.float64)[:, None, None]
        steps = np.clip(np.rint(np.where(valid, values, 0) / factors), 0, self.top)
        return np.where(valid, steps, self.nodata).astype(self.dtype)

    def check(self, bands: list[BandSpec]) -> None:
        """Refuse bands whose unit this encoding would clip without a word."""
        for band in bands:
            if self.scale_of(band) <= 0:
                raise InputError(f"band {band.name} has scale {band.scale}", expected="a scale above 0")
            if self.dtype == "uint8" and band.unit != "m" and band.scale is None:
                raise InputError(
                    f"band {band.name} ({band.unit}) does not fit encoding uint8m",
                    expected="metres, or a band scale",
                    remedy="use --encoding uint16cm or float32",
                )


ENCODINGS = {
    e.name: e
    for e in (
        Encoding("float32", "float32", float("nan"), 1.0, 0),
        Encoding("uint16cm", "uint16", 65535, 0.01, 65534),
        Encoding("uint8m", "uint8", 255, 1.0, 254),
    )
}


def encoding_named(name: str) -> Encoding:
    """The encoding of a name. Raises InputError listing the names."""
    if name not in ENCODINGS:
        raise InputError(f"encoding {name!r}", where="--encoding", expected=", ".join(ENCODINGS))
    return ENCODINGS[name]
