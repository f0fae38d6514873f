"""What two sensors see of the synthetic forest: airborne lidar (LAZ) and GEDI-like shots (HDF5).

Lidar: one pulse falls in every cell of `PULSE_CELL_M`; where in it, and what it does, is hashed from the
cell, so that the file does not depend on the cut of the scene. The first return of a pulse lies on the
surface of the pixel that it hits (roof, crown or ground) with `RANGE_SIGMA_M` of ranging noise, at most three
of it: no point but noise (class 7) lies more than that above `chm + dtm` of its pixel.

GEDI, in the layout of an L2A version 2 granule: relative height RH p is the p-th percentile of the true
heights above ground of all pixels whose centre lies in the 25 m disc at the shot's TRUE position, ground
pixels counting with 0 m. (Real RH are percentiles of the waveform's energy, Dubayah et al. 2020; here every
pixel of the disc returns the same energy, from its top.) RH100 is the disc's highest pixel, RH0 its lowest.
What real shots suffer from is planted: position errors, and shots that each filter flag must catch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.runtime import Progress
from canopy.synth.forest import ROOF, TREE, WATER, SceneSpec, hash01
from canopy.synth.render import truth

DISC_RADIUS_M = 12.5
BEAMS = ("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011", "BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011")
COVERAGE = frozenset(BEAMS[:4])
ALONG_M, ACROSS_M = 60.0, 75.0
HEADING_DEG = 52.0
_FIRST_ORBIT = 20_000
_SHARES = {"quality_0": 0.08, "degraded": 0.05, "insensitive": 0.08}
_VARIABLES: dict[str, Any] = {
    "beam": np.uint16, "shot_number": np.uint64, "delta_time": np.float64, "lat_lowestmode": np.float64,
    "lon_lowestmode": np.float64, "elev_lowestmode": np.float32, "digital_elevation_model": np.float32,
    "quality_flag": np.uint8, "degrade_flag": np.uint8, "sensitivity": np.float32,
    "solar_elevation": np.float32, "geolocation/sensitivity_a2": np.float32,
    "land_cover_data/landsat_water_persistence": np.uint8, "land_cover_data/urban_proportion": np.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """Where a shot was taken, metres in the scene's plane, and what is wrong with it ("" for nothing)."""

    beam: str
    number: int
    frame: int
    x: float
    y: float
    fault: str
    rng: np.random.Generator


def disc_heights(spec: SceneSpec, x: float, y: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True height, ground elevation and surface code of the pixels in the disc round (x, y), each (n,)."""
    gsd = spec.gsd_m
    col, row = (int(np.floor((v - DISC_RADIUS_M) / gsd)) for v in (x, -y))
    side = int(np.ceil(2 * DISC_RADIUS_M / gsd)) + 1
    seen = truth(spec, col * gsd, -row * gsd, side, side)
    dx = (col + np.arange(side) + 0.5) * gsd - x
    dy = -(row + np.arange(side) + 0.5) * gsd - y
    disc = np.hypot(dx[None, :], dy[:, None]) <= DISC_RADIUS_M
    return seen.chm[disc], seen.dtm[disc], seen.surface[disc]


def tracks(plane: tuple[float, float, float, float]) -> range:
    """Numbers of the ground tracks that may cross (west, south, east, north); beam = number modulo 8."""
    across = _across([plane[0], plane[0], plane[2], plane[2]], [plane[1], plane[3], plane[1], plane[3]])
    return range(int(np.floor(across.min() / ACROSS_M)), int(np.ceil(across.max() / ACROSS_M)) + 1)


def _heading() -> tuple[float, float]:
    return float(np.sin(np.deg2rad(HEADING_DEG))), float(np.cos(np.deg2rad(HEADING_DEG)))


def _across(x: list[float], y: list[float]) -> np.ndarray:
    east, north = _heading()
    return np.array(x) * north - np.array(y) * east


def shots_on(spec: SceneSpec, track: int, plane: tuple[float, float, float, float]) -> Iterator[Shot]:
    """The shots of one track whose disc lies wholly inside the scene; the same whatever the scene's size."""
    east, north = _heading()
    reach = np.hypot(max(abs(plane[0]), abs(plane[2])), max(abs(plane[1]), abs(plane[3])))
    last = int(reach / ALONG_M) + 1
    beam, orbit = BEAMS[track % 8], _FIRST_ORBIT + (track // 8) % 10_000
    room = DISC_RADIUS_M + spec.gsd_m
    for step in range(-last, last + 1):
        x = track * ACROSS_M * north + (step + track % 8 / 8) * ALONG_M * east
        y = -track * ACROSS_M * east + (step + track % 8 / 8) * ALONG_M * north
        if not (plane[0] + room < x < plane[2] - room and plane[1] + room < y < plane[3] - room):
            continue
        rng = np.random.default_rng([spec.seed, track % 2**32, step % 2**32, 9])
        pick, fault = rng.random(), ""
        for name, share in _SHARES.items():
            if 0 <= pick < share:
                fault = name
            pick -= share
        frame = (step + 50_000_000) % 100_000_000
        number = ((orbit * 100 + int(beam[4:], 2)) * 1000 + 2) * 100_000_000 + frame
        yield Shot(beam, number, frame, x, y, fault, rng)


def measure(spec: SceneSpec, shot: Shot, jitter_m: float) -> dict[str, Any]:
    """What the instrument reports of a shot; `x`, `y` are the REPORTED place in the scene's plane, metres."""
    rng = shot.rng
    height, ground, surface = disc_heights(spec, shot.x, shot.y)
    rh = np.percentile(height, np.arange(101)).astype(np.float32)
    off = rng.normal(0.0, 1.0, 2) * jitter_m
    turn, far = rng.uniform(0, 2 * np.pi), rng.uniform(30, 70)
    low = 0.955 if shot.beam not in COVERAGE else 0.951
    sensitivity = rng.uniform(low, 0.99)
    elevation = float(ground.mean())
    if shot.fault == "quality_0":  # a cloud or a wrong mode taken for the ground
        wrong = np.float32(rng.uniform(8.0, 40.0))
        rh, elevation = rh + wrong, elevation - float(wrong)
    elif shot.fault == "degraded":  # the pointing was poor
        off = off + far * np.array([np.cos(turn), np.sin(turn)])
    elif shot.fault == "insensitive":  # the pulse was too weak to reach the ground
        sensitivity, lost = rng.uniform(0.5, 0.93), np.float32(0.4) * rh[-1]
        rh, elevation = rh - lost, elevation + float(lost)
    return {
        "x": shot.x + off[0], "y": shot.y + off[1], "rh": rh, "elev_lowestmode": elevation,
        "digital_elevation_model": float(ground.mean()) + rng.normal(0, 2.0),
        "quality_flag": int(shot.fault != "quality_0"), "degrade_flag": int(shot.fault == "degraded"),
        "sensitivity": sensitivity, "geolocation/sensitivity_a2": min(sensitivity + 0.01, 0.999),
        "land_cover_data/landsat_water_persistence": round(100 * float((surface == WATER).mean())),
        "land_cover_data/urban_proportion": round(100 * float((surface == ROOF).mean())),
        "solar_elevation": rng.uniform(-40, 60), "beam": int(shot.beam[4:], 2), "shot_number": shot.number,
    }  # fmt: skip


def write_gedi(
    path: Path, spec: SceneSpec, grid: Grid, origin_xy: tuple[float, float], day: date,
    jitter_m: float, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Write the HDF5 file; returns what was planted, with every shot's true and reported place.

    Shots go out track by track. Shot numbers are texts in the result: JSON readers make floats of them.
    """
    import h5py

    (west, south, east, north), (ox, oy) = grid.bounds, origin_xy
    plane = (west - ox, south - oy, east - ox, north - oy)
    lonlat = transformer(grid.crs, "EPSG:4326")
    begin = (day - date(2018, 1, 1)).days * 86_400.0
    planted: list[dict[str, Any]] = []
    with h5py.File(path, "w", libver="v110") as file:
        file.attrs["short_name"], file.attrs["source"] = "GEDI_L2A", "canopy synthetic scene"
        for beam in BEAMS:
            _open_beam(file.create_group(beam), beam)
        for track in tracks(plane):
            rows = []
            for shot in shots_on(spec, track, plane):
                row = measure(spec, shot, jitter_m)
                x, y = row.pop("x") + ox, row.pop("y") + oy
                row["lon_lowestmode"], row["lat_lowestmode"] = lonlat.transform(x, y)
                row["delta_time"] = begin + (track // 8) * 5_600.0 + (shot.frame - 50_000_000) / 121.0
                rows.append(row)
                true = [round(shot.x + ox, 3), round(shot.y + oy, 3)]
                reported = [round(float(x), 3), round(float(y), 3)]
                planted.append(
                    {"shot_number": str(shot.number), "beam": shot.beam, "true_xy": true,
                     "reported_xy": reported, "fault": shot.fault}
                )  # fmt: skip
            if rows:
                _append(file[BEAMS[track % 8]], rows)
            progress.advance()
    faults = {name: sum(p["fault"] == name for p in planted) for name in _SHARES}
    return {"count": len(planted), "jitter_m": jitter_m, "faults": faults, "disc_m": 2 * DISC_RADIUS_M,
            "shots": planted}  # fmt: skip


def _open_beam(group: Any, beam: str) -> None:
    group.attrs["description"] = "Coverage beam" if beam in COVERAGE else "Full power beam"
    for name, dtype in _VARIABLES.items():
        group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(1024,))
    group.create_dataset("rh", (0, 101), np.float32, maxshape=(None, 101), chunks=(256, 101), compression=4)


def _append(group: Any, rows: list[dict[str, Any]]) -> None:
    for name in (*_VARIABLES, "rh"):
        data = group[name]
        data.resize(len(data) + len(rows), axis=0)
        # Through the dtype at once: a shot number must never pass through a float.
        data[-len(rows) :] = np.array([row[name] for row in rows], data.dtype)


PULSE_CELL_M = 0.4
RANGE_SIGMA_M = 0.02
BLOCK_CELLS = 256
CLASSES = {2: "ground", 3: "low vegetation", 5: "high vegetation", 6: "building", 7: "noise", 9: "water"}
_HIGH_M = 2.0  # vegetation from here on is class 5, below it class 3
# Of ground, low and high vegetation, building, noise, water.
_INTENSITY = np.array([900, 700, 600, 1200, 100, 60], np.uint16)[:, None]
_EPOCH_S = 4.0e8  # any GPS second will do; returns of a pulse share theirs


@dataclass(frozen=True)
class Returns:
    """Lidar returns as columns: metres in the scene's plane, LAS class, number, count, and their pulse."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    kind: np.ndarray
    number: np.ndarray
    count: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, keep: np.ndarray) -> Returns:
        """The rows of a mask or an index."""
        return Returns(**{name: getattr(self, name)[keep] for name in self.__dataclass_fields__})


def blocks(bounds: tuple[float, float, float, float]) -> list[tuple[int, int]]:
    """Indices (i, j) of the pulse blocks that meet (west, south, east, north), from the south-west."""
    side = BLOCK_CELLS * PULSE_CELL_M
    west, south, east, north = (v / side for v in bounds)
    rows = range(int(np.floor(south)), int(np.ceil(north)))
    return [(i, j) for j in rows for i in range(int(np.floor(west)), int(np.ceil(east)))]


def returns_in(spec: SceneSpec, block: tuple[int, int], bounds: tuple[float, float, float, float]) -> Returns:
    """All returns of one block whose pulses fall within `bounds` of the scene's plane (metres)."""
    cells = [np.arange(BLOCK_CELLS, dtype=np.int64) + BLOCK_CELLS * k for k in block]
    i, j = (c.ravel() for c in np.meshgrid(*cells))
    draw = [hash01(spec.seed, 200 + n, i, j) for n in range(8)]
    x, y = (i + 0.1 + 0.8 * draw[0]) * PULSE_CELL_M, (j + 0.1 + 0.8 * draw[1]) * PULSE_CELL_M
    west, south, east, north = bounds
    inside = (x > west) & (x < east) & (y > south) & (y < north)
    i, j, x, y, draw = i[inside], j[inside], x[inside], y[inside], [d[inside] for d in draw]
    if not len(x):
        return Returns(*[np.zeros(0)] * 7)
    gsd = spec.gsd_m
    cols, rows = np.floor(x / gsd).astype(np.int64), np.floor(-y / gsd).astype(np.int64)
    col, row = int(cols.min()), int(rows.min())
    seen = truth(spec, col * gsd, -row * gsd, int(rows.max()) - row + 1, int(cols.max()) - col + 1)
    at = (rows - row, cols - col)
    seconds = _EPOCH_S + (j % 2**16 * 2**16 + i % 2**16) * 1e-6
    return _trace(x, y, seconds, draw, seen.chm[at], seen.dtm[at], seen.surface[at], seen.roof[at])


def _trace(
    x: np.ndarray, y: np.ndarray, seconds: np.ndarray, draw: list[np.ndarray],
    chm: np.ndarray, dtm: np.ndarray, surface: np.ndarray, roof: np.ndarray,
) -> Returns:  # fmt: skip
    """Up to three returns per pulse: the surface, something inside the crown, and the ground below it."""
    crown = surface == TREE
    first = dtm + np.maximum(chm, roof)
    kind = np.where(crown, np.where(chm >= _HIGH_M, 5, 3), 2).astype(np.uint8)
    kind[surface == ROOF], kind[surface == WATER] = 6, 9
    # Leaves let more light through than one thinks; tall crowns a little less.
    inside = crown & (chm > 3.0) & (draw[2] < 0.28)
    below = crown & (draw[3] < 0.34 - 0.006 * chm)
    count = (1 + inside + below).astype(np.uint8)
    depth = (0.15 + 0.75 * draw[4]) * chm
    parts = [
        (np.ones(len(x), bool), first, kind, np.ones(len(x), np.uint8)),
        (inside, first - depth, np.where(chm - depth >= _HIGH_M, 5, 3), np.full(len(x), 2)),
        (below, dtm, np.full(len(x), 2), count),
    ]
    lost = ((surface == WATER) & (draw[5] < 0.7)) | (draw[5] > 0.995)
    columns = []
    for n, (keep, z, kinds, number) in enumerate(parts):
        keep = keep & ~lost
        # Three sums of uniforms make a bell; each return has its own error.
        bell = sum(((draw[6] * (7 + 10 * n + k)) % 1.0 for k in range(3)), -1.5) * 2.0
        z = z + RANGE_SIGMA_M * bell
        columns.append((x[keep], y[keep], z[keep], kinds[keep], number[keep], count[keep], seconds[keep]))
    # Birds and multipath: about one pulse in three thousand, far above or below everything.
    odd = (draw[7] < 3e-4) & ~lost
    off = np.where(draw[4] < 0.5, 25.0 + 60.0 * draw[3], -6.0 - 12.0 * draw[3])
    base = np.where(off > 0, first, dtm)
    one = np.ones(int(odd.sum()))
    columns.append((x[odd], y[odd], (base + off)[odd], 7 * one, one, one, seconds[odd] + 5e-7))
    dtypes = (np.float64, np.float64, np.float64, np.uint8, np.uint8, np.uint8, np.float64)
    joined = [np.concatenate(c).astype(t) for c, t in zip(zip(*columns, strict=True), dtypes, strict=True)]
    flown = Returns(*joined)
    return flown.take(np.lexsort((flown.number, flown.seconds)))


def write_points(
    path: Path, spec: SceneSpec, grid: Grid, origin_xy: tuple[float, float], day: date, progress: Progress
) -> dict[str, int]:
    """Write the LAZ file (format 6, cm) of the scene on `grid`; returns counts by class name and in total.

    Memory does not depend on the scene's size: points go out block by block, in the blocks' fixed order.
    """
    import laspy
    from pyproj import CRS

    west, south, east, north = grid.bounds
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.add_crs(CRS.from_wkt(grid.crs.to_wkt()))
    header.scales = np.array([0.01, 0.01, 0.01])
    header.offsets = np.array([np.floor(west), np.floor(south), 0.0])
    header.creation_date = day
    header.generating_software, header.system_identifier = "canopy", "synthetic scene"
    ox, oy = origin_xy
    plane = (west - ox, south - oy, east - ox, north - oy)
    totals = dict.fromkeys(CLASSES.values(), 0)
    with laspy.open(path, mode="w", header=header, laz_backend=laspy.LazBackend.Lazrs) as writer:
        for chunk in _blocks_of(spec, plane, progress):
            if len(chunk):
                writer.write_points(_record(laspy, header, chunk, origin_xy, grid.bounds))
            for code, name in CLASSES.items():
                totals[name] += int((chunk.kind == code).sum())
    return {"total": sum(totals.values()), **totals}


def _blocks_of(
    spec: SceneSpec, plane: tuple[float, float, float, float], progress: Progress
) -> Iterator[Returns]:
    for block in blocks(plane):
        yield returns_in(spec, block, plane)
        progress.advance()


def _record(  # type: ignore[no-untyped-def]
    laspy, header, chunk: Returns, origin_xy: tuple[float, float], bounds: tuple[float, ...]
):
    """laspy's points of some returns, in the header's CRS."""
    points = laspy.ScaleAwarePointRecord.zeros(len(chunk), header=header)
    west, south, east, north = bounds
    # Whole centimetres may round over the scene's edge: keep every point inside it.
    points.x = np.clip(chunk.x + origin_xy[0], west, east - 0.01)
    points.y = np.clip(chunk.y + origin_xy[1], south + 0.01, north)
    points.z = chunk.z
    points.classification = chunk.kind
    points.return_number, points.number_of_returns = chunk.number, chunk.count
    points.gps_time = chunk.seconds
    points.intensity = np.choose(np.searchsorted([3, 5, 6, 7, 9], chunk.kind, "right"), _INTENSITY)
    return points
