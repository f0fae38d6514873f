"""A procedural forest whose every pixel is known: terrain, stands, trees, roads, water, houses.

What stands at a place is a pure function of (seed, world position): trees live in hashed cells, fields are
hashed lattice noise. So any window can be rendered on its own and equals the same pixels of the whole,
bit for bit, and a scene of any size can be written tile by tile. Pure NumPy and SciPy: training uses it on
machines without any geo library.

World plane: x metres east, y metres north; rows of an array run south.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MIX = np.uint64(0x9E3779B97F4A7C15)
MAX_HEIGHT_M = 45.0
MAX_RADIUS_M = 7.0


@dataclass(frozen=True)
class SceneSpec:
    """A scene. Two specs with equal fields give equal pixels.

    Attributes:
        seed: what stands where.
        gsd_m: pixel side in metres.
        sun_azimuth_deg, sun_elevation_deg: clockwise from north; above the horizon.
        density: 0..1, how much of the land is wooded.
        conifers: 0..1, share of conifer stands.
        height_m: height of a tall stand's typical tree.
        dryness: 0 lush green .. 1 straw and bare soil.
        plantation: trees stand in rows.
        gain, offset: per-channel radiometry of the camera, on 0..1.
        saturation: of the camera; blur_px: its point spread; noise: its standard deviation.
    """

    seed: int = 0
    gsd_m: float = 0.5
    sun_azimuth_deg: float = 145.0
    sun_elevation_deg: float = 48.0
    density: float = 0.52
    conifers: float = 0.35
    height_m: float = 24.0
    dryness: float = 0.25
    plantation: bool = False
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    saturation: float = 1.0
    blur_px: float = 0.7
    noise: float = 0.012


@dataclass(frozen=True)
class SynthTile:
    """A rendered window.

    Attributes:
        rgb: uint8 (3, h, w).
        chm: float32 (h, w), canopy height in metres, 0 on ground, roads, water and roofs.
        dtm: float32 (h, w), ground elevation in metres.
        surface: uint8 (h, w), one of the codes GROUND, TREE, ROAD, WATER, ROOF.
    """

    rgb: np.ndarray
    chm: np.ndarray
    dtm: np.ndarray
    surface: np.ndarray


GROUND, TREE, ROAD, WATER, ROOF = range(5)


def random_spec(seed: int, gsd_m: float = 0.5) -> SceneSpec:
    """A different place, sun and camera for every seed: closed forest to savanna, conifer to broadleaf."""
    rng = np.random.default_rng([seed, 77])
    return SceneSpec(
        seed=seed,
        gsd_m=gsd_m,
        sun_azimuth_deg=float(rng.uniform(90, 270)),
        sun_elevation_deg=float(rng.uniform(32, 68)),
        density=float(rng.choice([0.15, 0.4, 0.65, 0.8, 0.95])),
        conifers=float(rng.choice([0.0, 0.2, 0.5, 1.0])),
        height_m=float(rng.uniform(8, 34)),
        dryness=float(rng.uniform(0, 0.9)),
        plantation=bool(rng.random() < 0.12),
        gain=tuple(np.exp(rng.normal(0, 0.08, 3)).tolist()),
        offset=tuple(rng.normal(0.0, 0.02, 3).tolist()),
        saturation=float(np.exp(rng.normal(0, 0.25))),
        blur_px=float(rng.uniform(0.4, 1.1)),
        noise=float(rng.uniform(0.004, 0.025)),
    )


# --- noise that depends on world position alone -------------------------------------------------


def hash01(seed: int, salt: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) from integers, broadcast over `i` and `j` (splitmix64 finaliser)."""
    with np.errstate(over="ignore"):
        x = i.astype(np.int64).view(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        x = x ^ (j.astype(np.int64).view(np.uint64) * np.uint64(0x94D049BB133111EB))
        x = x + np.uint64((seed * 1_000_003 + salt * 7919 + 1) % 2**63) * _MIX
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _ease(t: np.ndarray) -> np.ndarray:
    return t * t * (3.0 - 2.0 * t)


def noise_grid(seed: int, salt: int, x: np.ndarray, y: np.ndarray, wave_m: float) -> np.ndarray:
    """Value noise in 0..1 on the grid `y` (h,) by `x` (w,); float32 (h, w)."""
    u, v = x / wave_m, y / wave_m
    iu, iv = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    cols, rows = np.arange(iu.min(), iu.max() + 2), np.arange(iv.min(), iv.max() + 2)
    lattice = hash01(seed, salt, cols[None, :], rows[:, None]).astype(np.float32)
    fu, fv = _ease(u - iu).astype(np.float32), _ease(v - iv).astype(np.float32)
    a, b = iu - cols[0], iv - rows[0]
    # Interpolate along x on the short lattice first: cheap where waves are long.
    along = lattice[:, a] * (1 - fu) + lattice[:, a + 1] * fu
    return along[b] * (1 - fv)[:, None] + along[b + 1] * fv[:, None]


def noise_at(seed: int, salt: int, x: np.ndarray, y: np.ndarray, wave_m: float) -> np.ndarray:
    """The same noise at scattered points; float32 of the points' shape."""
    u, v = x / wave_m, y / wave_m
    iu, iv = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    fu, fv = _ease(u - iu), _ease(v - iv)
    corner = _corners(seed, salt, iu, iv)
    low, high = corner[0] * (1 - fu) + corner[1] * fu, corner[2] * (1 - fu) + corner[3] * fu
    return (low * (1 - fv) + high * fv).astype(np.float32)


def _corners(seed: int, salt: int, i: np.ndarray, j: np.ndarray) -> list[np.ndarray]:
    """Hashes of the lattice corners (i, j), (i + 1, j), (i, j + 1), (i + 1, j + 1)."""
    steps = [(du, dv) for dv in (0, 1) for du in (0, 1)]
    if i.size:
        west, south = int(i.min()), int(j.min())
        cols, rows = np.arange(west, int(i.max()) + 2), np.arange(south, int(j.max()) + 2)
        if len(cols) * len(rows) < i.size:
            # Many points on few corners: hash each corner once. The values are the same.
            table = hash01(seed, salt, cols[None, :], rows[:, None])
            return [table[j - south + dv, i - west + du] for du, dv in steps]
    return [hash01(seed, salt, i + du, j + dv) for du, dv in steps]


def _cells(
    west: float, south: float, east: float, north: float, cell: float
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (n,), (n,) of the square world cells that meet the box, in a fixed order."""
    i, j = np.meshgrid(
        np.arange(np.floor(west / cell), np.floor(east / cell) + 1).astype(np.int64),
        np.arange(np.floor(south / cell), np.floor(north / cell) + 1).astype(np.int64),
    )
    return i.ravel(), j.ravel()


# --- trees ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trees:
    """Trees as columns, in a fixed world order; positions and sizes in metres.

    `shape`: 0 conifer cone, 1 round crown, 2 dome, 3 lobed crown. `tint` (n, 2): hue and brightness, 0..1.
    """

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    radius: np.ndarray
    shape: np.ndarray
    tint: np.ndarray
    angle: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


# Cell side in metres, share of the stand's height, share of cells that hold a tree: dominant trees,
# the storey below, and shrubs, which also stand in the open.
STOREYS = ((6.5, 1.0, 0.92), (4.5, 0.55, 0.5), (3.2, 0.14, 0.35))


def trees_in(spec: SceneSpec, west: float, south: float, east: float, north: float) -> Trees:
    """All trees whose stem stands in the box; the same tree has the same values whatever the box."""
    parts = [_storey(spec, k, *storey, (west, south, east, north)) for k, storey in enumerate(STOREYS)]
    columns = {f: np.concatenate([getattr(p, f) for p in parts]) for f in Trees.__dataclass_fields__}
    return Trees(**columns)


def _storey(
    spec: SceneSpec, k: int, cell: float, share: float, chance: float, box: tuple[float, float, float, float]
) -> Trees:
    west, south, east, north = box
    i, j = _cells(west, south, east, north, cell)
    draw = [hash01(spec.seed, 100 + 20 * k + n, i, j) for n in range(9)]
    jitter = 0.25 if spec.plantation and k == 0 else 0.9
    x = (i + 0.5 + jitter * (draw[0] - 0.5)) * cell
    y = (j + 0.5 + jitter * (draw[1] - 0.5)) * cell
    wooded = forest_at(spec, x, y)
    limit = chance * (wooded if k < 2 else 0.25 + 0.4 * wooded)
    keep = (draw[2] < limit) & (x >= west) & (x < east) & (y >= south) & (y < north)
    keep &= ~_built_at(spec, x, y)
    x, y, draw = x[keep], y[keep], [d[keep] for d in draw]
    stand = noise_at(spec.seed, 3, x, y, 170.0)
    height = spec.height_m * share * (0.3 + 1.0 * stand) * (0.7 + 0.6 * draw[3])
    conifer = noise_at(spec.seed, 4, x, y, 210.0) * 0.75 + 0.25 * draw[4] < 0.1 + 0.8 * spec.conifers
    conifer = (conifer & (spec.conifers > 0)) | (spec.conifers >= 1)
    if k == 2:
        height = 0.6 + 3.5 * draw[3] ** 2
        conifer[:] = False
    height = np.clip(height, 0.4, MAX_HEIGHT_M - 1.0)
    spread = np.where(conifer, 1.1 + 0.1 * height, 1.3 + 0.135 * height) * (0.75 + 0.5 * draw[5])
    radius = np.clip(spread if k < 2 else 0.7 + 0.45 * height, 0.6, MAX_RADIUS_M)
    shape = np.where(conifer, 0, 1 + np.floor(3 * draw[6])).astype(np.int8)
    return Trees(x, y, height, radius, shape, np.stack([draw[7], draw[8]], 1), 2 * np.pi * draw[6])


def forest_at(spec: SceneSpec, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How wooded the land is at points, 0..1; edges are soft over some ten metres."""
    field = 0.6 * noise_at(spec.seed, 1, x, y, 230.0) + 0.4 * noise_at(spec.seed, 2, x, y, 70.0)
    return np.clip((field - (0.78 - 0.72 * spec.density)) * 9.0 + 0.5, 0.0, 1.0)


# --- water, roads, houses: contours of smooth fields ------------------------------------------------


def river_m(spec: SceneSpec, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, roughly in metres, to the bank; negative in the water."""
    return _contour_m(spec.seed, 11, x, y, 620.0) - 9.0 * noise_at(spec.seed, 12, x, y, 260.0)


def road_m(spec: SceneSpec, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, roughly in metres, to the road's edge; negative on the road."""
    return _contour_m(spec.seed, 13, x, y, 480.0) - 3.2


def _contour_m(seed: int, salt: int, x: np.ndarray, y: np.ndarray, wave_m: float) -> np.ndarray:
    """Distance to the field's half level, to first order: |f - 1/2| / |grad f|."""
    step = 4.0
    here = noise_at(seed, salt, x, y, wave_m) - 0.5
    slope_x = noise_at(seed, salt, x + step, y, wave_m) - 0.5 - here
    slope_y = noise_at(seed, salt, x, y + step, wave_m) - 0.5 - here
    slope = np.sqrt(slope_x**2 + slope_y**2) / step
    return np.abs(here) / np.maximum(slope, 2e-4)


def _built_at(spec: SceneSpec, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """True where no stem may stand: on or beside water, roads and houses."""
    blocked = (river_m(spec, x, y) < 1.5) | (road_m(spec, x, y) < 1.5)
    if not len(x):
        return blocked
    for house in houses_in(spec, x.min(), y.min(), x.max(), y.max()):
        blocked |= np.hypot(x - house[0], y - house[1]) < 11.0
    return blocked


def houses_in(
    spec: SceneSpec, west: float, south: float, east: float, north: float
) -> list[tuple[float, ...]]:
    """Houses (x, y, half width, half length, angle, roof tone) whose centre is within 15 m of the box."""
    cell = 45.0
    i, j = _cells(west - 15, south - 15, east + 15, north + 15, cell)
    draw = [hash01(spec.seed, 40 + n, i, j) for n in range(7)]
    x, y = (i + 0.2 + 0.6 * draw[0]) * cell, (j + 0.2 + 0.6 * draw[1]) * cell
    road = road_m(spec, x, y)
    keep = (draw[2] < 0.4) & (road > 9) & (road < 40) & (river_m(spec, x, y) > 25)
    columns = (x, y, 3.5 + 2.5 * draw[3], 5 + 5 * draw[4], np.pi * draw[5], draw[6])
    return [tuple(float(c[n]) for c in columns) for n in np.flatnonzero(keep)]
