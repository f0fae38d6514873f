"""Paint a window of the synthetic forest: surfaces, then light, then colour, then the camera.

Every step is local and works on whole pixels of one world lattice; what it needs from beyond the window is
made too. So a window equals the same pixels of any larger one, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from canopy.synth.forest import (
    GROUND,
    MAX_HEIGHT_M,
    MAX_RADIUS_M,
    ROAD,
    ROOF,
    TREE,
    WATER,
    SceneSpec,
    SynthTile,
    Trees,
    hash01,
    houses_in,
    noise_grid,
    river_m,
    road_m,
    trees_in,
)

_ROOF_M = 5.0
_PAD_PX = 16  # reach of gradients, blurs and the sky view

# Reflectance-like colours, 0..1: (dark, bright) ends of what each cover may look like.
_BROADLEAF = np.array([[0.20, 0.32, 0.13], [0.43, 0.50, 0.24]], np.float32)
_CONIFER = np.array([[0.15, 0.27, 0.16], [0.28, 0.41, 0.23]], np.float32)
_GRASS = np.array([[0.36, 0.46, 0.24], [0.66, 0.60, 0.40]], np.float32)  # lush, straw
_SOIL = np.array([0.62, 0.52, 0.40], np.float32)
_ROAD = np.array([0.62, 0.60, 0.56], np.float32)
_WATER = np.array([0.17, 0.22, 0.19], np.float32)
_ROOFS = np.array([[0.45, 0.44, 0.44], [0.85, 0.83, 0.80]], np.float32)


@dataclass(frozen=True)
class Truth:
    """What stands in a window, as (h, w) arrays; row 0 in the north.

    Attributes:
        chm, dtm, surface: as in `SynthTile`.
        roof: float32, height of roofs above the ground in metres, 0 elsewhere.
        owner: int32, index into `trees` of the crown seen from above, -1 where there is none.
        trees: every tree that may reach into the window.
    """

    chm: np.ndarray
    dtm: np.ndarray
    surface: np.ndarray
    roof: np.ndarray
    owner: np.ndarray
    trees: Trees


def render(spec: SceneSpec, x0_m: float, y0_m: float, height_px: int, width_px: int) -> SynthTile:
    """Render the window whose upper-left corner is (`x0_m`, `y0_m`) in the scene's plane.

    Corners are taken to the nearest whole pixel of the lattice through the plane's origin.

    Returns:
        `SynthTile` with arrays of `height_px` x `width_px`, row 0 in the north.
    """
    gsd = spec.gsd_m
    sun = _sun(spec)
    reach = int(np.ceil((MAX_HEIGHT_M + 8.0) / sun[2] * np.hypot(sun[0], sun[1]) / gsd)) + 2
    # Only the side towards the sun can throw a shadow into the window.
    top, bottom = (reach if sun[1] > 0 else 0) + _PAD_PX, (reach if sun[1] < 0 else 0) + _PAD_PX
    left, right = (reach if sun[0] < 0 else 0) + _PAD_PX, (reach if sun[0] > 0 else 0) + _PAD_PX
    col, row = round(x0_m / gsd), round(-y0_m / gsd)
    rows = np.arange(row - top, row + height_px + bottom)
    cols = np.arange(col - left, col + width_px + right)
    x, y = _centres(spec, rows, cols)
    ground = _survey(spec, rows, cols)
    chm, dtm, surface, trees, owner = ground.chm, ground.dtm, ground.surface, ground.trees, ground.owner

    light = _light(dtm + np.maximum(chm, ground.roof), sun, gsd)
    work = (slice(top - _PAD_PX, top + height_px + _PAD_PX), slice(left - _PAD_PX, left + width_px + _PAD_PX))
    colour = _colours(spec, trees, x[work[1]], y[work[0]], surface[work], owner[work])
    rgb = _camera(spec, colour * light[:, *work], rows[work[0]], cols[work[1]])
    inner = (slice(top, top + height_px), slice(left, left + width_px))
    core = (slice(None), slice(_PAD_PX, -_PAD_PX), slice(_PAD_PX, -_PAD_PX))
    return SynthTile(
        np.ascontiguousarray(rgb[core]), chm[inner].copy(), dtm[inner].copy(), surface[inner].copy()
    )


def truth(spec: SceneSpec, x0_m: float, y0_m: float, height_px: int, width_px: int) -> Truth:
    """What `render` shows in the same window, without its picture: bit for bit the same arrays, sooner."""
    col, row = round(x0_m / spec.gsd_m), round(-y0_m / spec.gsd_m)
    return _survey(spec, np.arange(row, row + height_px), np.arange(col, col + width_px))


def _centres(spec: SceneSpec, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World x (w,) and y (h,) of pixel centres, metres."""
    return (cols + 0.5) * spec.gsd_m, -(rows + 0.5) * spec.gsd_m


def _survey(spec: SceneSpec, rows: np.ndarray, cols: np.ndarray) -> Truth:
    """Ground, cover and crowns on the pixels `rows` x `cols` of the lattice."""
    x, y = _centres(spec, rows, cols)
    surface, roof = _ground_cover(spec, x, y)
    margin = 1.25 * MAX_RADIUS_M  # a lobed crown reaches a fifth beyond its radius
    trees = trees_in(spec, x[0] - margin, y[-1] - margin, x[-1] + margin, y[0] + margin)
    chm, owner = _stamp(spec, trees, rows, cols)
    # Nothing hangs over roads, water and roofs in this world: the truth there is 0 m.
    chm[surface != GROUND], owner[surface != GROUND] = 0.0, -1
    surface[owner >= 0] = TREE
    return Truth(chm, terrain(spec, x, y), surface, roof, owner, trees)


def _sun(spec: SceneSpec) -> tuple[float, float, float]:
    """Unit vector towards the sun: east, north, up."""
    azimuth, elevation = np.deg2rad(spec.sun_azimuth_deg), np.deg2rad(spec.sun_elevation_deg)
    flat = np.cos(elevation)
    return float(flat * np.sin(azimuth)), float(flat * np.cos(azimuth)), float(np.sin(elevation))


def terrain(spec: SceneSpec, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ground elevation in metres on the grid `y` (h,) by `x` (w,); float32 (h, w)."""
    waves = ((900.0, 40.0), (330.0, 14.0), (110.0, 3.0), (35.0, 0.7))
    layers = [a * noise_grid(spec.seed, 20 + n, x, y, wave) for n, (wave, a) in enumerate(waves)]
    return np.float32(300.0) + layers[0] + layers[1] + layers[2] + layers[3]


def _ground_cover(spec: SceneSpec, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of what covers the ground without trees, and the height of roofs in metres."""
    gx, gy = np.meshgrid(x, y)
    surface = np.full(gx.shape, GROUND, np.uint8)
    roof = np.zeros(gx.shape, np.float32)
    surface[road_m(spec, gx, gy) < 0] = ROAD
    surface[river_m(spec, gx, gy) < 0] = WATER
    for hx, hy, half_w, half_l, angle, _ in houses_in(spec, x[0], y[-1], x[-1], y[0]):
        across = (gx - hx) * np.cos(angle) + (gy - hy) * np.sin(angle)
        along = (gy - hy) * np.cos(angle) - (gx - hx) * np.sin(angle)
        inside = (np.abs(across) < half_w) & (np.abs(along) < half_l)
        surface[inside] = ROOF
        roof[inside] = (_ROOF_M + 2.5 * (1 - np.abs(across[inside]) / half_w)).astype(np.float32)
    return surface, roof


def _stamp(
    spec: SceneSpec, trees: Trees, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Highest crown surface (h, w) float32 in metres, and the index of its tree (-1: none)."""
    gsd = spec.gsd_m
    chm = np.zeros((len(rows), len(cols)), np.float32)
    owner = np.full(chm.shape, -1, np.int32)
    x, y = _centres(spec, rows, cols)
    # Clumps of leaves: bumps that belong to the place, scaled by the crown they are on.
    bumps = noise_grid(spec.seed, 30, x, y, 1.7) + 0.6 * noise_grid(spec.seed, 31, x, y, 0.8) - 0.8
    r0 = np.floor((-trees.y - trees.radius * 1.2) / gsd).astype(int) - rows[0]
    r1 = np.ceil((-trees.y + trees.radius * 1.2) / gsd).astype(int) - rows[0]
    c0 = np.floor((trees.x - trees.radius * 1.2) / gsd).astype(int) - cols[0]
    c1 = np.ceil((trees.x + trees.radius * 1.2) / gsd).astype(int) - cols[0]
    r0, c0 = np.maximum(r0, 0), np.maximum(c0, 0)
    r1, c1 = np.minimum(r1, len(rows)), np.minimum(c1, len(cols))
    for n in np.flatnonzero((r0 < r1) & (c0 < c1)):
        win = (slice(r0[n], r1[n]), slice(c0[n], c1[n]))
        dx, dy = x[win[1]] - trees.x[n], y[win[0]] - trees.y[n]
        top = _crown(trees, n, dx[None, :], dy[:, None], bumps[win])
        higher = top > chm[win]
        chm[win][higher] = top[higher]
        owner[win][higher] = n
    return chm, owner


def _crown(
    trees: Trees, n: np.signedinteger, dx: np.ndarray, dy: np.ndarray, bumps: np.ndarray
) -> np.ndarray:
    """Crown surface in metres around stem `n`, 0 outside the crown."""
    height, radius, shape = trees.height[n], trees.radius[n], trees.shape[n]
    d = np.sqrt(dx * dx + dy * dy) / radius
    if shape == 3:
        turn = np.arctan2(dy, dx) + trees.angle[n]
        d = d / (1.0 + 0.14 * np.sin(3 * turn) + 0.07 * np.sin(5 * turn + 1.0))
    edge = 1.0 - np.minimum(d, 1.0)
    if shape == 0:
        top = height * (0.30 + 0.70 * edge)
        top = top + 0.25 * bumps
    else:
        depth = min(0.55 * height, 0.8 * radius + 1.0)
        profile = np.sqrt(np.maximum(1.0 - d * d, 0.0)) if shape != 2 else 1.0 - np.minimum(d, 1.0) ** 2
        top = height - depth * (1.0 - profile) + min(0.12 * height, 1.1) * bumps
    return np.where(d < 1.0, np.maximum(top, 0.2), 0.0).astype(np.float32)


def _light(z: np.ndarray, sun: tuple[float, float, float], gsd: float) -> np.ndarray:
    """Light (3, h, w) that falls on the surface `z`: direct sun where no shadow lies, plus blue sky."""
    soft = ndimage.gaussian_filter(z, 0.7, truncate=3.0)
    slope_y, slope_x = np.gradient(soft, gsd)
    facing = (-slope_x * sun[0] + slope_y * sun[1] + sun[2]) / np.sqrt(1 + slope_x**2 + slope_y**2)
    lit = ndimage.uniform_filter((~_shadow(z, sun, gsd)).astype(np.float32), 3)
    # Gaps between crowns see little sky: darker the deeper they lie below their surroundings.
    depth = np.clip(ndimage.uniform_filter(z, 9) - z, 0.0, 12.0)
    sky = np.exp(-depth / 7.0)
    direct = 0.95 * np.clip(facing, 0.0, None) * lit
    tint = np.array([0.26, 0.30, 0.36], np.float32)[:, None, None]
    return (direct[None] + tint * sky[None]).astype(np.float32)


def _shadow(z: np.ndarray, sun: tuple[float, float, float], gsd: float) -> np.ndarray:
    """True where something towards the sun rises above the ray; marched pixel by pixel."""
    flat = float(np.hypot(sun[0], sun[1]))
    climb = sun[2] / flat * gsd
    shadow = np.zeros(z.shape, bool)
    height, width = z.shape
    for step in range(1, int((MAX_HEIGHT_M + 8.0) / climb) + 1):
        dr, dc = round(-sun[1] / flat * step), round(sun[0] / flat * step)
        here = (slice(max(-dr, 0), height - max(dr, 0)), slice(max(-dc, 0), width - max(dc, 0)))
        there = (slice(max(dr, 0), height - max(-dr, 0)), slice(max(dc, 0), width - max(-dc, 0)))
        if here[0].start >= here[0].stop or here[1].start >= here[1].stop:
            break
        shadow[here] |= z[there] - np.float32(climb * step) > z[here] + np.float32(0.15)
    return shadow


def _colours(
    spec: SceneSpec, trees: Trees, x: np.ndarray, y: np.ndarray, surface: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """Colour (3, h, w) of every surface under even light."""
    fine = noise_grid(spec.seed, 50, x, y, 0.9) - 0.5
    patch = noise_grid(spec.seed, 51, x, y, 14.0)
    broad = noise_grid(spec.seed, 52, x, y, 90.0)
    dry = np.clip(spec.dryness + 0.9 * (broad - 0.5) + 0.5 * (patch - 0.5), 0, 1)[..., None]
    bare = np.clip(2.4 * (patch + 0.5 * spec.dryness + 0.25 * fine) - 1.75, 0, 1)[..., None]
    rgb = _GRASS[0] * (1 - dry) + _GRASS[1] * dry
    rgb = rgb * (1 - 0.8 * bare) + _SOIL * 0.8 * bare
    rgb = rgb * (1 + 0.35 * fine[..., None])
    rgb = np.where((surface == ROAD)[..., None], _ROAD * (1 + 0.12 * fine[..., None]), rgb)
    rgb = np.where((surface == WATER)[..., None], _WATER * (0.9 + 0.25 * broad[..., None]), rgb)
    for hx, hy, half_w, half_l, _, tone in houses_in(spec, x[0], y[-1], x[-1], y[0]):
        near = np.hypot(x[None, :] - hx, y[:, None] - hy) < np.hypot(half_w, half_l) + 1
        rgb[near & (surface == ROOF)] = _ROOFS[0] * (1 - tone) + _ROOFS[1] * tone
    crown = surface == TREE
    if crown.any():
        rgb[crown] = _leaf_colours(spec, trees)[owner[crown]] * (1 + 0.35 * fine[crown])[:, None]
    return np.ascontiguousarray(np.moveaxis(rgb.astype(np.float32), -1, 0))


def _leaf_colours(spec: SceneSpec, trees: Trees) -> np.ndarray:
    """One colour per tree (n, 3): its kind, its tint, and a little drought."""
    ends = np.where((trees.shape == 0)[:, None, None], _CONIFER, _BROADLEAF)
    mix = trees.tint[:, :1]
    colour = ends[:, 0] * (1 - mix) + ends[:, 1] * mix
    colour = colour * (0.8 + 0.4 * trees.tint[:, 1:])
    tired = (0.5 * spec.dryness * (hash01(spec.seed, 60, np.floor(7 * trees.x), np.floor(7 * trees.y))))[
        :, None
    ]
    return (colour * (1 - tired) + np.array([0.48, 0.42, 0.26]) * tired).astype(np.float32)


def _camera(spec: SceneSpec, radiance: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Radiance (3, h, w) -> uint8: haze, point spread, saturation, gain and offset, grain."""
    image = ndimage.gaussian_filter(radiance, (0, spec.blur_px, spec.blur_px), truncate=3.0)
    image = 0.07 + 0.93 * np.clip(image, 0.0, None) ** 0.85
    grey = image.mean(axis=0, keepdims=True)
    image = grey + (image - grey) * np.float32(spec.saturation)
    gain, offset = np.array([spec.gain, spec.offset], np.float32)[..., None, None]
    grain = [hash01(spec.seed, 70 + band, cols[None, :], rows[:, None]) - 0.5 for band in range(3)]
    image = image * gain + offset + np.float32(3.46 * spec.noise) * np.stack(grain).astype(np.float32)
    return np.round(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
