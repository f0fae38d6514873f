"""The highest point of a correlation surface, finer than its pixels.

How far an image and a lidar canopy height model lie apart, measured on the trees themselves.

An image does not look like a height map: a crown is bright on one side, dark on the other, and throws a
shadow that no height map has. Correlating the two directly is wrong by a metre or more, towards the sun.
So the heights are lit first: for a supposed sun they give direct light (slope towards the sun, cast shadows)
and vegetation (higher than 2 m), and the logarithm of the image's brightness is explained by those two. For
every displacement at once, by Fourier transforms, the share of the image's variance that they explain is
computed (a phase correlation with two signals instead of one); the sun and the displacement that explain
most win. Both sides are band-passed to crown sizes first. NumPy and SciPy only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from canopy.errors import InputError


def peak_of(surface: np.ndarray) -> tuple[float, float, float]:
    """(down, right) in pixels from the middle of (h, w) to its highest point, and the height there.

    The place is refined by the parabola through the point's neighbours, in each direction.
    """
    row, col = (int(i) for i in np.unravel_index(surface.argmax(), surface.shape))
    return (
        row + _vertex(surface[:, col], row) - surface.shape[0] // 2,
        col + _vertex(surface[row], col) - surface.shape[1] // 2,
        float(surface[row, col]),
    )


def _vertex(line: np.ndarray, at: int) -> float:
    if not 0 < at < len(line) - 1:
        return 0.0
    before, here, after = (float(v) for v in line[at - 1 : at + 2])
    bend = before - 2 * here + after
    return 0.0 if bend >= 0 else 0.5 * (before - after) / bend


_FINEST_M, _COARSEST_M = 1.5, 16.0  # structures from a branch to a group of crowns
_VEGETATION_M = 2.0
_LEAST_SIDE_M = 48.0
_LEAST_VALID = 0.2
# Signal seen from sun search to final measurement; a finer grid adds time, not truth.
_SEARCH_GSD_M, _FINAL_GSD_M = 2.0, 0.5


@dataclass(frozen=True)
class Shift:
    """Where the heights lie relative to the image: `height[r + down, c + right]` belongs to `image[r, c]`.

    Attributes:
        down_m, right_m: displacement of the heights, ground metres, positive to the south and east.
        fit: share (0..1) of the band-passed image that the lit heights explain at this displacement.
        distinct: `fit` over the best fit further away.
        agreement: share of the four quarters that, measured alone, find it too (within 1.5 m).
        sun_azimuth_deg, sun_elevation_deg: the sun that explains the image best.
    """

    down_m: float
    right_m: float
    fit: float
    distinct: float
    agreement: float
    sun_azimuth_deg: float
    sun_elevation_deg: float

    @property
    def length_m(self) -> float:
        """Length of the displacement in metres."""
        return float(np.hypot(self.down_m, self.right_m))

    @property
    def is_sure(self) -> bool:
        """Whether it may be acted upon: the best fit stands alone and most of the tile agrees."""
        return self.fit >= 0.008 and self.distinct >= 2.5 and self.agreement >= 0.75


def measure_shift(
    rgb: np.ndarray, height_m: np.ndarray, valid: np.ndarray, gsd_m: float, *, limit_m: float = 12.0
) -> Shift | None:
    """Measure the displacement of heights against an image on the same pixel grid.

    Args:
        rgb: float (3, h, w) in 0..1.
        height_m: (h, w) canopy height in metres; ignored where not valid.
        valid: bool (h, w), True where both are known.
        gsd_m: ground metres per pixel, at most 2.
        limit_m: largest displacement looked for, in each direction.

    Returns:
        The displacement, or None where there is nothing to measure: less than 48 m or 20 % of the tile
        known, or no height structure. Look at `is_sure` before using it.

    Raises:
        InputError: the shapes differ or the pixels are coarser than 2 m.
    """
    if rgb.ndim != 3 or rgb.shape[1:] != height_m.shape or valid.shape != height_m.shape:
        raise InputError(f"image {rgb.shape}, heights {height_m.shape} and validity {valid.shape} differ")
    if not 0 < gsd_m <= _SEARCH_GSD_M:
        raise InputError(f"pixels of {gsd_m:g} m", expected="at most 2 m, to see crowns")
    if min(height_m.shape) * gsd_m < _LEAST_SIDE_M or valid.mean() < _LEAST_VALID:
        return None
    known = np.where(valid, height_m, 0)
    if not (known > _VEGETATION_M)[valid].mean() > 0.01 or np.std(known[valid]) < 0.5:
        return None
    bright = np.log(rgb.mean(axis=0, dtype=np.float32) + np.float32(0.03))
    fine = _Scene(bright, _fill(height_m, valid), valid, gsd_m).coarser(_FINAL_GSD_M)
    coarse = fine.coarser(_SEARCH_GSD_M)
    middle = fine.coarser(1.0)
    first = ((a, e) for e in (38.0, 56.0) for a in range(0, 360, 30))
    sun = _best_sun(coarse, first, limit_m)
    for step in (15.0, 8.0):
        near = [(sun[0] + da, min(max(sun[1] + de, 20.0), 80.0)) for da, de in _around(step)]
        sun = _best_sun(middle, near, limit_m)
    return _measure(fine, (sun[0] % 360, sun[1]), limit_m)


def _around(step: float) -> list[tuple[float, float]]:
    return [(0, 0), (-step, 0), (step, 0), (0, -step / 2), (0, step / 2)]


def _fill(height_m: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Unknown heights take the nearest known one, so that holes have no cliffs that throw shadows."""
    if valid.all():
        return height_m.astype(np.float32)
    at = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return height_m[at[0], at[1]].astype(np.float32)


class _Scene:
    """Log brightness and heights on one grid, with the window that fades out edges and holes."""

    def __init__(self, bright: np.ndarray, height: np.ndarray, valid: np.ndarray, gsd_m: float) -> None:
        self.bright, self.height, self.valid, self.gsd_m = bright, height, valid, gsd_m
        fade = max(2, round(8.0 / gsd_m))
        soft = ndimage.binary_erosion(valid, iterations=max(1, round(1.0 / gsd_m)), border_value=1)
        window = ndimage.gaussian_filter(soft.astype(np.float32), 1.0 / gsd_m)
        rows, cols = (_ramp(n, fade) for n in height.shape)
        self.window = window * rows[:, None] * cols[None, :]
        # The slow part is removed against a mean over known pixels only: holes must not look like anything.
        self._sigma = _COARSEST_M / gsd_m / (2 * np.pi)
        self._local = np.maximum(ndimage.gaussian_filter(self.window, self._sigma), 1e-3)
        # Padding keeps a displacement from wrapping around to the other side.
        self.shape = [fft.next_fast_len(n + round(16 / gsd_m), real=True) for n in height.shape]

    def coarser(self, gsd_m: float) -> _Scene:
        """The same scene averaged to about `gsd_m`; itself where that is no coarser."""
        n = round(gsd_m / self.gsd_m)
        if n < 2:
            return self
        h, w = (size // n * n for size in self.height.shape)

        def mean(x: np.ndarray) -> np.ndarray:
            return x[:h, :w].astype(np.float32).reshape(h // n, n, w // n, n).mean(axis=(1, 3))

        return _Scene(mean(self.bright), mean(self.height), mean(self.valid) > 0.5, self.gsd_m * n)

    def quarters(self) -> Iterable[_Scene]:
        h, w = (n // 2 for n in self.height.shape)
        for top in (0, h):
            for left in (0, w):
                part = np.s_[top : top + h, left : left + w]
                yield _Scene(self.bright[part], self.height[part], self.valid[part], self.gsd_m)

    def spectrum(self, signal: np.ndarray) -> np.ndarray:
        """Fourier transform of the band-passed signal; one filter for both sides keeps the peak's place."""
        slow = ndimage.gaussian_filter(signal * self.window, self._sigma) / self._local
        fast = ndimage.gaussian_filter((signal - slow) * self.window, _FINEST_M / self.gsd_m / (2 * np.pi))
        return fft.rfft2(fast, self.shape)

    def fit(self, sun: tuple[float, float]) -> np.ndarray:
        """Explained share of the image for every displacement of the heights, (rows, cols), wrapped."""
        light = _light(self.height, sun, self.gsd_m)
        plants = (self.height > _VEGETATION_M).astype(np.float32)
        image = self.spectrum(self.bright)
        signals = [self.spectrum(light), self.spectrum(plants)]
        surfaces = np.stack([fft.irfft2(s * np.conj(image), self.shape) for s in signals])
        inner = np.array([[_inner(a, b, self.shape) for b in signals] for a in signals])
        inner += np.eye(2) * (1e-3 * np.trace(inner) / 2 + 1e-12)
        explained = np.einsum("ihw,ij,jhw->hw", surfaces, np.linalg.inv(inner), surfaces)
        return explained / max(_inner(image, image, self.shape), 1e-12)


def _inner(a: np.ndarray, b: np.ndarray, shape: list[int]) -> float:
    """Inner product of two real signals, from their half spectra (Parseval)."""
    products = (a * np.conj(b)).real
    doubled = products.sum() * 2 - products[:, 0].sum()
    if shape[1] % 2 == 0:
        doubled -= products[:, -1].sum()
    return float(doubled / (shape[0] * shape[1]))


def _ramp(size: int, fade: int) -> np.ndarray:
    fade = min(fade, size // 2)
    out = np.ones(size, np.float32)
    edge = np.sin(np.linspace(0, np.pi / 2, fade, endpoint=False, dtype=np.float32)) ** 2
    out[:fade] = edge
    out[size - fade :] = edge[::-1]
    return out


def _light(height: np.ndarray, sun: tuple[float, float], gsd_m: float) -> np.ndarray:
    """Direct sunlight on a height map: the cosine to the sun, 0 in cast shadows.

    `sun` is (azimuth, elevation) in degrees, clockwise from north and above the horizon; rows run south.
    """
    azimuth, elevation = np.radians(sun)
    down, right = -np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation)
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(height, 0.35 / gsd_m), gsd_m)
    facing = (np.sin(elevation) - slope_y * down - slope_x * right) / np.sqrt(1 + slope_x**2 + slope_y**2)
    shadow = np.zeros(height.shape, bool)
    climb = np.float32(np.tan(elevation) * gsd_m)
    flat = np.cos(elevation)
    h, w = height.shape
    for step in range(1, int(np.percentile(height, 99.5) / climb) + 2):
        dr, dc = round(down / flat * step), round(right / flat * step)
        if abs(dr) >= h or abs(dc) >= w:
            break
        here = np.s_[max(-dr, 0) : h - max(dr, 0), max(-dc, 0) : w - max(dc, 0)]
        there = np.s_[max(dr, 0) : h - max(-dr, 0), max(dc, 0) : w - max(-dc, 0)]
        shadow[here] |= height[there] - climb * step > height[here] + np.float32(0.15)
    return np.where(shadow, 0, np.clip(facing, 0, None)).astype(np.float32)


def _best_sun(scene: _Scene, suns: Iterable[tuple[float, float]], limit_m: float) -> tuple[float, float]:
    return max(suns, key=lambda sun: float(_near(scene.fit(sun), scene.gsd_m, limit_m).max()))


def _near(surface: np.ndarray, gsd_m: float, limit_m: float) -> np.ndarray:
    """The part of a wrapped surface within `limit_m`, displacement 0 in the middle."""
    reach = [min(round(limit_m / gsd_m), n // 2 - 1) for n in surface.shape]
    return surface[np.ix_(*(np.arange(-n, n + 1) for n in reach))]


def _measure(scene: _Scene, sun: tuple[float, float], limit_m: float) -> Shift:
    near = _near(scene.fit(sun), scene.gsd_m, limit_m)
    down, right, fit = peak_of(near)
    rows, cols = (np.arange(n) - n // 2 for n in near.shape)
    away = np.hypot(rows[:, None] - down, cols[None, :] - right) * scene.gsd_m > 5.0
    rest = float(near[away].max()) if away.any() else 0.0
    found = [peak_of(_near(part.fit(sun), part.gsd_m, limit_m)) for part in scene.quarters()]
    same = [np.hypot(r - down, c - right) * scene.gsd_m <= 1.5 for r, c, _ in found]
    return Shift(
        down_m=down * scene.gsd_m,
        right_m=right * scene.gsd_m,
        fit=fit,
        distinct=fit / max(rest, 1e-9),
        agreement=float(np.mean(same)),
        sun_azimuth_deg=sun[0],
        sun_elevation_deg=sun[1],
    )
