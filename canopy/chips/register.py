"""How far two height maps of one place lie apart, or an image and heights, measured on what they show.

Both sides are reduced to structures of a few pixels and correlated for every displacement at once by Fourier
transforms. `ShiftMeter` adds up windows and gives the displacement of the highest point, with what speaks for
it: how well the structures correlate there, how far that point stands out, whether single windows agree.

Two height rasters are correlated as they are. An image does not look like a height map: a
crown is bright on one side and dark on the other, and throws a shadow, so correlating the two directly is
wrong by a metre or more, towards the sun. `image_shift` therefore explains the image's log brightness by what
heights would show under any sun, all in one least-squares fit per displacement: vegetation, the slope's two
directions and its steepness, and shadows cast from eight directions. NumPy and SciPy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

LIMIT_M, IMAGE_LIMIT_M = 10.0, 12.0  # largest displacement looked for, in each direction
_FINE_PX, _COARSE_PX = 0.6, 5.5  # standard deviations between which structures are looked at
_LEAST_VALID, _LEAST_SIDE_PX = 0.2, 24
_AWAY_M = 5.0  # a rival displacement lies at least so far away
_VEGETATION_M = 2.0
_FITTING_GSD_M = 0.5
_LEAST_SIDE_M = 48.0
_SHADOW_DIRECTIONS, _SHADOW_ELEVATION_DEG = 8, 35.0


class Demand(NamedTuple):
    """What a displacement needs before it may be acted upon; see `Shift` for the words."""

    fit: float = 0.2
    distinct: float = 1.0
    agreement: float = 0.5


# Heights explain little of an image, so that the peak's standing alone has to say more.
OF_IMAGES = Demand(fit=0.09, distinct=1.8, agreement=0.75)


@dataclass(frozen=True)
class Shift:
    """Where the moving side lies: `moving[r + down, c + right]` belongs to `fixed[r, c]`.

    Attributes:
        down_m, right_m: displacement of the moving side, ground metres, positive to the south and east.
        fit: (multiple) correlation of the structures at this displacement; fit_unshifted: at none.
        distinct: the share explained here over the largest further away.
        agreement: share of the windows that, measured alone, find it too (to 1.5 m, or 1.5 pixels).
        spread_m: median distance of what single windows find; None where there is one window.
        windows: how many were used.
        doubt: why it may not be acted upon; None where it may.
    """

    down_m: float
    right_m: float
    fit: float
    fit_unshifted: float
    distinct: float
    agreement: float
    spread_m: float | None
    windows: int
    doubt: str | None = None

    @property
    def length_m(self) -> float:
        """Length of the displacement in metres."""
        return float(np.hypot(self.down_m, self.right_m))

    @property
    def is_sure(self) -> bool:
        """Whether it may be acted upon."""
        return self.doubt is None


class ShiftMeter:
    """Takes windows of both sides, then tells the displacement.

    Args:
        pixel_m: ground metres per pixel, (x, y).
        limit_m: largest displacement looked for, at least two pixels.
        demand: what makes the answer a sure one.
    """

    def __init__(
        self, pixel_m: tuple[float, float], limit_m: float = LIMIT_M, demand: Demand | None = None
    ) -> None:
        self.pixel_m, self.limit_m, self.demand = pixel_m, limit_m, demand or Demand()
        self._reach = [max(2, int(np.ceil(limit_m / side))) for side in pixel_m[::-1]]  # rows, columns
        self._sums: _Sums | None = None
        self._places: list[tuple[float, float]] = []  # (down, right) metres, of each window alone

    def add(self, moving: np.ndarray, fixed: np.ndarray, valid: np.ndarray) -> bool:
        """Add a window; False where it tells nothing (small, mostly unknown, flat).

        Args:
            moving: (h, w), or (k, h, w): several signals that together explain `fixed`.
            fixed, valid: (h, w) on the same grid; nothing is looked at where not valid.
        """
        if min(valid.shape) < max(_LEAST_SIDE_PX, 2 * max(self._reach)) or valid.mean() < _LEAST_VALID:
            return False
        signals = moving if moving.ndim == 3 else moving[None]
        window = _Sums.of(signals, fixed, valid, self._reach)
        if window.power < 1e-6 * valid.size or np.diag(window.inner).max() < 1e-6 * valid.size:
            return False
        down, right, _ = peak_of(window.correlation())
        self._places.append((down * self.pixel_m[1], right * self.pixel_m[0]))
        self._sums = window if self._sums is None else self._sums.plus(window)
        return True

    def result(self) -> Shift | None:
        """The displacement; None where no window told anything."""
        if self._sums is None:
            return None
        surface = self._sums.correlation()
        down, right, fit = peak_of(surface)
        metres = down * self.pixel_m[1], right * self.pixel_m[0]
        rows, cols = (np.arange(-n, n + 1) * m for n, m in zip(self._reach, self.pixel_m[::-1], strict=True))
        away = np.hypot(rows[:, None] - metres[0], cols - metres[1]) > _AWAY_M
        rival = float(surface[away].max()) if away.any() else 0.0
        distances = np.hypot(*(np.array(self._places) - metres).T)
        near = max(1.5, 1.5 * max(self.pixel_m))
        found = Shift(
            *metres,
            fit=fit,
            fit_unshifted=float(surface[self._reach[0], self._reach[1]]),
            distinct=(max(fit, 0.0) / max(rival, 1e-6)) ** 2,
            agreement=float((distances <= near).mean()),
            spread_m=float(np.median(distances)) if len(distances) > 1 else None,
            windows=len(distances),
        )
        edge = abs(down) > self._reach[0] - 0.5 or abs(right) > self._reach[1] - 0.5
        return replace(found, doubt=self._doubt(found, edge))

    def _doubt(self, found: Shift, at_edge: bool) -> str | None:
        needed = self.demand
        if found.fit < needed.fit:
            return f"the structures of both sides hardly correlate ({found.fit:.2f}, needed {needed.fit:g})"
        if at_edge:
            return f"at the edge of what was searched ({self.limit_m:g} m)"
        if found.distinct < needed.distinct:
            return f"another displacement fits about as well (1 : {found.distinct:.1f})"
        if found.agreement < needed.agreement:
            return f"single windows disagree ({found.agreement:.0%} find it, needed {needed.agreement:.0%})"
        return None


def image_shift(rgb: np.ndarray, height_m: np.ndarray, valid: np.ndarray, gsd_m: float) -> Shift | None:
    """Displacement of heights against an image on the same pixel grid.

    Args:
        rgb: float (3, h, w) in 0..1.
        height_m: (h, w) canopy height in metres; ignored where not valid.
        valid: bool (h, w), True where both are known.
        gsd_m: ground metres per pixel, at most 2.

    Returns:
        The displacement, or None where there is nothing to measure: less than 48 m or 20 % of the tile
        known, or no height structure. Look at `is_sure` before using it.
    """
    if min(height_m.shape) * gsd_m < _LEAST_SIDE_M or valid.mean() < _LEAST_VALID:
        return None
    known = height_m[valid]
    if not (known > _VEGETATION_M).mean() > 0.01 or np.std(known) < 0.5:
        return None
    bright = np.log(rgb.mean(axis=0, dtype=np.float32) + np.float32(0.03))
    n = max(1, round(_FITTING_GSD_M / gsd_m))
    bright, heights = (block_means(x, n) for x in (bright, _filled(height_m, valid)))
    there = block_means(valid.astype(np.float32), n) > 0.5
    signals = _seen_under_any_sun(heights, gsd_m * n)
    meter = ShiftMeter((gsd_m * n, gsd_m * n), IMAGE_LIMIT_M, OF_IMAGES)
    h, w = (size // 2 for size in heights.shape)
    for part in (np.s_[r : r + h, c : c + w] for r in (0, h) for c in (0, w)):
        meter.add(signals[:, *part], bright[part], there[part])
    return meter.result()


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
    """Where the parabola through a point and its two neighbours is highest, relative to the point."""
    if not 0 < at < len(line) - 1:
        return 0.0
    before, here, after = (float(v) for v in line[at - 1 : at + 2])
    bend = before - 2 * here + after
    return 0.0 if bend >= 0 else 0.5 * (before - after) / bend


def block_means(x: np.ndarray, n: int) -> np.ndarray:
    """Means (h // n, w // n) over n x n pixels of (h, w); a rest at the edges is left out."""
    h, w = (size // n * n for size in x.shape)
    return x[:h, :w].reshape(h // n, n, w // n, n).mean(axis=(1, 3)) if n > 1 else x


@dataclass(frozen=True, eq=False)
class _Sums:
    """What windows add up to: cross-correlations (k, rows, cols), inner products (k, k), the fixed power."""

    cross: np.ndarray
    inner: np.ndarray
    power: float

    @classmethod
    def of(cls, signals: np.ndarray, fixed: np.ndarray, valid: np.ndarray, reach: list[int]) -> _Sums:
        """Of signals (k, h, w) and `fixed` (h, w); displacement 0 in the middle of `cross`."""
        weight = ndimage.gaussian_filter(valid.astype(np.float32), 1.0) * valid
        weight = weight * (_fade(valid.shape[0])[:, None] * _fade(valid.shape[1]))
        # The slow part is removed against a mean over known pixels only: holes must not look like anything.
        local = np.maximum(ndimage.gaussian_filter(weight, _COARSE_PX), 1e-3)

        def structure(x: np.ndarray) -> np.ndarray:
            x = np.where(valid, x, 0).astype(np.float32)
            slow = ndimage.gaussian_filter(x * weight, _COARSE_PX) / local
            return ndimage.gaussian_filter((x - slow) * weight, _FINE_PX)

        moving, still = np.stack([structure(x) for x in signals]), structure(fixed)
        # Padding keeps a displacement from wrapping around to the other side.
        shape = [fft.next_fast_len(n + 2 * k, real=True) for n, k in zip(still.shape, reach, strict=True)]
        product = fft.rfft2(moving, shape) * np.conj(fft.rfft2(still, shape))
        rows, cols = (np.arange(-k, k + 1) for k in reach)
        cross = fft.irfft2(product, shape)[:, rows[:, None], cols]
        flat = moving.reshape(len(moving), -1)
        return cls(cross, flat @ flat.T, float((still**2).sum()))

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(self.cross + other.cross, self.inner + other.inner, self.power + other.power)

    def correlation(self) -> np.ndarray:
        """Correlation at every displacement; of several signals the multiple one, which has no sign."""
        if len(self.inner) == 1:
            return self.cross[0] / np.sqrt(max(self.inner[0, 0] * self.power, 1e-12))
        ridge = np.diag(1e-3 * np.diag(self.inner) + 1e-9)
        explained = np.einsum("irc,ij,jrc->rc", self.cross, np.linalg.inv(self.inner + ridge), self.cross)
        return np.sqrt(np.maximum(explained, 0) / max(self.power, 1e-12))


def _fade(size: int) -> np.ndarray:
    """1 in the middle, falling towards both ends."""
    edge = max(1, min(16, size // 6))
    ramp = np.ones(size, np.float32)
    ramp[:edge] = np.sin(np.linspace(0, np.pi / 2, edge, endpoint=False)) ** 2
    ramp[size - edge :] = ramp[:edge][::-1]
    return ramp


def _filled(height_m: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Unknown heights take the nearest known one, so that holes have no cliffs that throw shadows."""
    if valid.all():
        return height_m.astype(np.float32)
    at = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return height_m[at[0], at[1]].astype(np.float32)


def _seen_under_any_sun(height_m: np.ndarray, gsd_m: float) -> np.ndarray:
    """What heights (h, w) look like: signals (k, h, w) of which light from any direction is about a sum.

    Lambert's cosine is linear in the surface's normal: its three parts stand for every sun at once. Cast
    shadows are not, but those from eight directions at a middling elevation come near.
    """
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(height_m, 0.35 / gsd_m), gsd_m)
    upward = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    signals = [height_m > _VEGETATION_M, upward, slope_y * upward, slope_x * upward]
    for azimuth in np.arange(_SHADOW_DIRECTIONS) * 2 * np.pi / _SHADOW_DIRECTIONS:
        signals.append(_shadow(height_m, -np.cos(azimuth), np.sin(azimuth), gsd_m))
    return np.stack(signals).astype(np.float32)


def _shadow(height_m: np.ndarray, down: float, right: float, gsd_m: float) -> np.ndarray:
    """Bool (h, w): whether something stands between a point and a sun in the direction (down, right)."""
    h, w = height_m.shape
    shadow = np.zeros((h, w), bool)
    climb = np.float32(np.tan(np.radians(_SHADOW_ELEVATION_DEG)) * gsd_m)
    for step in range(2, int(np.percentile(height_m, 99.5) / climb) + 2, 2):
        dr, dc = round(down * step), round(right * step)
        if abs(dr) >= h or abs(dc) >= w:
            break
        here = np.s_[max(-dr, 0) : h - max(dr, 0), max(-dc, 0) : w - max(dc, 0)]
        there = np.s_[max(dr, 0) : h - max(-dr, 0), max(dc, 0) : w - max(-dc, 0)]
        shadow[here] |= height_m[there] - climb * step > height_m[here] + np.float32(0.15)
    return shadow
