"""How far a height map lies from its reference, measured on the heights themselves.

Both sides are cut into windows, reduced to structures of crown size (a difference of Gaussians, holes filled
with the local mean), and correlated for all displacements at once by Fourier transform. The surfaces of all
windows are added; their highest point, refined by a parabola through its neighbours, is the displacement.
A displacement is only acted upon (`sure`) when the structures correlate there and the windows agree.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import fft, ndimage

from canopy.evaluation.result import MapShift
from canopy.geo.peak import peak_of

LIMIT_M = 10.0
LEAST_FIT = 0.2
_FINE_PX, _COARSE_PX = 0.7, 6.0
_LEAST_VALID = 0.3
_LEAST_SIDE_PX = 24


class ShiftMeter:
    """Takes windows of both sides, then tells the displacement.

    Args:
        pixel_m: ground metres per pixel, (x, y).
        limit_m: largest displacement looked for, at least two pixels.
    """

    def __init__(self, pixel_m: tuple[float, float], limit_m: float = LIMIT_M) -> None:
        self.pixel_m = pixel_m
        self.reach = tuple(max(2, int(np.ceil(limit_m / side))) for side in pixel_m)  # (x, y)
        rows, cols = 2 * self.reach[1] + 1, 2 * self.reach[0] + 1
        self._surface = np.zeros((rows, cols))
        self._power = np.zeros(2)
        self._peaks: list[tuple[float, float]] = []

    def add(self, map_m: np.ndarray, reference_m: np.ndarray, valid: np.ndarray) -> bool:
        """Add a window (h, w) of heights on one grid; False where it tells nothing (small, empty, flat)."""
        if min(valid.shape) < max(_LEAST_SIDE_PX, 2 * max(self.reach)) or valid.mean() < _LEAST_VALID:
            return False
        p, r = (_structure(x, valid) for x in (map_m, reference_m))
        power = (p**2).sum(), (r**2).sum()
        if min(power) < 1e-6 * p.size:
            return False
        surface = _correlate(p, r, self.reach)
        self._surface += surface
        self._power += power
        dy, dx, _ = peak_of(surface)
        self._peaks.append((dx * self.pixel_m[0], dy * self.pixel_m[1]))
        return True

    def result(self) -> MapShift | None:
        """The displacement; None where no window told anything."""
        if not self._peaks:
            return None
        fit = self._surface / np.sqrt(self._power[0] * self._power[1])
        dy, dx, best = peak_of(fit)
        east, north = dx * self.pixel_m[0], -dy * self.pixel_m[1]
        spread = None
        if len(self._peaks) > 1:
            away = np.hypot(*(np.array(self._peaks) - (east, -north)).T)
            spread = float(np.median(away))
        at_zero = float(fit[self.reach[1], self.reach[0]])
        note = self._doubt(best, dx, dy, spread)
        return MapShift(
            round(east, 3) + 0.0, round(north, 3) + 0.0, round(best, 4), round(at_zero, 4),
            None if spread is None else round(spread, 3), len(self._peaks), note is None, note,
        )  # fmt: skip

    def _doubt(self, fit: float, dx: float, dy: float, spread: float | None) -> str | None:
        """Why the displacement may not be acted upon; None where it may."""
        if fit < LEAST_FIT:
            return f"the structures of map and reference hardly correlate ({fit:.2f}, needed {LEAST_FIT})"
        if abs(dx) > self.reach[0] - 0.5 or abs(dy) > self.reach[1] - 0.5:
            return f"at the edge of what was searched ({LIMIT_M:g} m)"
        coarse = max(self.pixel_m)
        if spread is not None and spread > max(1.5 * coarse, 1.5):
            return f"single windows disagree (median distance {spread:.1f} m)"
        return None


def measure_shift(
    windows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    pixel_m: tuple[float, float],
    limit_m: float = LIMIT_M,
) -> MapShift | None:
    """Displacement of maps in windows (map_m, reference_m, valid), each (h, w); see `ShiftMeter`."""
    meter = ShiftMeter(pixel_m, limit_m)
    for map_m, reference_m, valid in windows:
        meter.add(map_m, reference_m, valid)
    return meter.result()


def _structure(height_m: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Heights between two scales, 0 on average and where nothing is known, faded out towards the edges."""
    weight = valid.astype(np.float64)
    local = ndimage.gaussian_filter(weight, _COARSE_PX)
    slow = ndimage.gaussian_filter(np.where(valid, height_m, 0.0), _COARSE_PX) / np.maximum(local, 1e-6)
    detail = ndimage.gaussian_filter(np.where(valid, height_m - slow, 0.0), _FINE_PX)
    rows, cols = (_fade(n) for n in valid.shape)
    detail *= rows[:, None] * cols
    return np.where(valid, detail - detail[valid].mean(), 0.0)


def _fade(size: int) -> np.ndarray:
    edge = max(1, min(16, size // 6))
    ramp = np.ones(size)
    ramp[:edge] = np.sin(np.linspace(0, np.pi / 2, edge, endpoint=False)) ** 2
    ramp[size - edge :] = ramp[:edge][::-1]
    return ramp


def _correlate(p: np.ndarray, r: np.ndarray, reach: tuple[int, ...]) -> np.ndarray:
    """Sum of p[row + dy, col + dx] r[row, col] for |dx|, |dy| within reach; displacement 0 in the middle."""
    shape = [fft.next_fast_len(n + 2 * k, real=True) for n, k in zip(p.shape, reach[::-1], strict=True)]
    product = fft.rfft2(p, shape) * np.conj(fft.rfft2(r, shape))
    surface = fft.irfft2(product, shape)
    rows, cols = (np.arange(-k, k + 1) for k in reach[::-1])
    return surface[np.ix_(rows, cols)]
