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
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.runtime import Progress
from canopy.synth.forest import ROOF, TREE, WATER, SceneSpec, hash01
from canopy.synth.render import truth

Box = tuple[float, float, float, float]

# ---- GEDI -------------------------------------------------------------------------------------
DISC_RADIUS_M = 12.5
BEAMS = ("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011", "BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011")
COVERAGE = frozenset(BEAMS[:4])
ALONG_M, ACROSS_M = 60.0, 75.0
_EAST, _NORTH = float(np.sin(np.deg2rad(52.0))), float(np.cos(np.deg2rad(52.0)))  # heading of the tracks
_FIRST_ORBIT = 20_000
_SHARES = {"quality_0": 0.08, "degraded": 0.05, "insensitive": 0.08}
_VARIABLES: dict[str, Any] = {
    "beam": np.uint16, "shot_number": np.uint64, "delta_time": np.float64, "lat_lowestmode": np.float64,
    "lon_lowestmode": np.float64, "elev_lowestmode": np.float32, "digital_elevation_model": np.float32,
    "quality_flag": np.uint8, "degrade_flag": np.uint8, "sensitivity": np.float32,
    "solar_elevation": np.float32, "geolocation/sensitivity_a2": np.float32,
    "land_cover_data/landsat_water_persistence": np.uint8, "land_cover_data/urban_proportion": np.uint8,
}  # fmt: skip


def tracks(plane: Box) -> range:
    """Numbers of the ground tracks that may cross (west, south, east, north); beam = number modulo 8."""
    across = [x * _NORTH - y * _EAST for x in plane[0::2] for y in plane[1::2]]
    return range(int(np.floor(min(across) / ACROSS_M)), int(np.ceil(max(across) / ACROSS_M)) + 1)


def _shots_on(track: int, plane: Box, gsd_m: float) -> Iterator[tuple[int, float, float]]:
    """Step along a track and true place (x, y) of the shots whose disc lies wholly inside the scene."""
    last = int(np.hypot(max(abs(plane[0]), abs(plane[2])), max(abs(plane[1]), abs(plane[3]))) / ALONG_M) + 1
    room = DISC_RADIUS_M + gsd_m
    for step in range(-last, last + 1):
        along = (step + track % 8 / 8) * ALONG_M
        x, y = track * ACROSS_M * _NORTH + along * _EAST, -track * ACROSS_M * _EAST + along * _NORTH
        if plane[0] + room < x < plane[2] - room and plane[1] + room < y < plane[3] - room:
            yield step, x, y


def _measure(
    spec: SceneSpec, track: int, step: int, x: float, y: float, jitter_m: float
) -> tuple[dict[str, Any], str]:
    """What the instrument reports of the shot at (x, y), and what is wrong with it ("" for nothing).

    `x` and `y` of the report are the place in the scene's plane that it states. A shot is the same whatever
    the scene's size.
    """
    rng = np.random.default_rng([spec.seed, track % 2**32, step % 2**32, 9])
    pick = rng.random()
    fault = next(
        (name for name, end in zip(_SHARES, np.cumsum([*_SHARES.values()]), strict=True) if pick < end), ""
    )
    beam, orbit, frame = (
        BEAMS[track % 8],
        _FIRST_ORBIT + (track // 8) % 10_000,
        (step + 50_000_000) % 100_000_000,
    )
    height, ground, surface = disc_heights(spec, x, y)
    rh = np.percentile(height, np.arange(101)).astype(np.float32)
    off = rng.normal(0.0, 1.0, 2) * jitter_m
    turn, far = rng.uniform(0, 2 * np.pi), rng.uniform(30, 70)
    sensitivity, elevation = rng.uniform(0.951 if beam in COVERAGE else 0.955, 0.99), float(ground.mean())
    if fault == "quality_0":  # a cloud or a wrong mode taken for the ground
        wrong = np.float32(rng.uniform(8.0, 40.0))
        rh, elevation = rh + wrong, elevation - float(wrong)
    elif fault == "degraded":  # the pointing was poor
        off = off + far * np.array([np.cos(turn), np.sin(turn)])
    elif fault == "insensitive":  # the pulse was too weak to reach the ground
        sensitivity, lost = rng.uniform(0.5, 0.93), np.float32(0.4) * rh[-1]
        rh, elevation = rh - lost, elevation + float(lost)
    return {
        "x": float(x + off[0]), "y": float(y + off[1]), "rh": rh, "elev_lowestmode": elevation,
        "digital_elevation_model": float(ground.mean()) + rng.normal(0, 2.0),
        "quality_flag": int(fault != "quality_0"), "degrade_flag": int(fault == "degraded"),
        "sensitivity": sensitivity, "geolocation/sensitivity_a2": min(sensitivity + 0.01, 0.999),
        "land_cover_data/landsat_water_persistence": round(100 * float((surface == WATER).mean())),
        "land_cover_data/urban_proportion": round(100 * float((surface == ROOF).mean())),
        "solar_elevation": rng.uniform(-40, 60), "beam": int(beam[4:], 2),
        "shot_number": ((orbit * 100 + int(beam[4:], 2)) * 1000 + 2) * 100_000_000 + frame,
        "delta_time": (track // 8) * 5_600.0 + (frame - 50_000_000) / 121.0,
    }, fault  # fmt: skip


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
            group = file.create_group(beam)
            group.attrs["description"] = "Coverage beam" if beam in COVERAGE else "Full power beam"
            for name, dtype in _VARIABLES.items():
                group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(1024,))
            rh = {"maxshape": (None, 101), "chunks": (256, 101), "compression": 4}
            group.create_dataset("rh", (0, 101), np.float32, **rh)
        for track in tracks(plane):
            rows, beam = [], BEAMS[track % 8]
            for step, true_x, true_y in _shots_on(track, plane, spec.gsd_m):
                row, fault = _measure(spec, track, step, true_x, true_y, jitter_m)
                x, y = row.pop("x") + ox, row.pop("y") + oy
                row["lon_lowestmode"], row["lat_lowestmode"] = lonlat.transform(x, y)
                row["delta_time"] += begin
                rows.append(row)
                places = {"true_xy": (true_x + ox, true_y + oy), "reported_xy": (x, y)}
                rounded = {name: [round(v, 3) for v in place] for name, place in places.items()}
                planted.append(
                    {"shot_number": str(row["shot_number"]), "beam": beam, **rounded, "fault": fault}
                )
            for name in (*_VARIABLES, "rh") if rows else ():
                data = file[beam][name]
                data.resize(len(data) + len(rows), axis=0)
                # Through the dtype at once: a shot number must never pass through a float.
                data[-len(rows) :] = np.array([row[name] for row in rows], data.dtype)
            progress.advance()
    faults = {name: sum(p["fault"] == name for p in planted) for name in _SHARES}
    return {"count": len(planted), "jitter_m": jitter_m, "faults": faults, "disc_m": 2 * DISC_RADIUS_M,
            "shots": planted}  # fmt: skip


# ---- lidar ------------------------------------------------------------------------------------
PULSE_CELL_M = 0.4
RANGE_SIGMA_M = 0.02
BLOCK_CELLS = 256
CLASSES = {2: "ground", 3: "low vegetation", 5: "high vegetation", 6: "building", 7: "noise", 9: "water"}
_HIGH_M = 2.0  # vegetation from here on is class 5, below it class 3
# Of ground, low and high vegetation, building, noise, water.
_INTENSITY = np.array([900, 700, 600, 1200, 100, 60], np.uint16)[:, None]
_EPOCH_S = 4.0e8  # any GPS second will do; returns of a pulse share theirs
# Metres in the scene's plane, LAS class, number among the returns of its pulse, and the pulse.
_RETURN = np.dtype(
    [
        ("x", "f8"),
        ("y", "f8"),
        ("z", "f8"),
        ("kind", "u1"),
        ("number", "u1"),
        ("count", "u1"),
        ("seconds", "f8"),
    ]
)


def blocks(bounds: Box) -> list[tuple[int, int]]:
    """Indices (i, j) of the pulse blocks that meet (west, south, east, north), from the south-west."""
    side = BLOCK_CELLS * PULSE_CELL_M
    west, south, east, north = (v / side for v in bounds)
    rows = range(int(np.floor(south)), int(np.ceil(north)))
    return [(i, j) for j in rows for i in range(int(np.floor(west)), int(np.ceil(east)))]


def returns_in(spec: SceneSpec, block: tuple[int, int], bounds: Box) -> np.ndarray:
    """All returns (`_RETURN`) of one block whose pulses fall within `bounds` of the scene's plane."""
    cells = [np.arange(BLOCK_CELLS, dtype=np.int64) + BLOCK_CELLS * k for k in block]
    i, j = (c.ravel() for c in np.meshgrid(*cells))
    draw = np.stack([hash01(spec.seed, 200 + n, i, j) for n in range(8)])
    x, y = (i + 0.1 + 0.8 * draw[0]) * PULSE_CELL_M, (j + 0.1 + 0.8 * draw[1]) * PULSE_CELL_M
    west, south, east, north = bounds
    inside = (x > west) & (x < east) & (y > south) & (y < north)
    i, j, x, y, draw = i[inside], j[inside], x[inside], y[inside], draw[:, inside]
    if not len(x):
        return np.empty(0, _RETURN)
    gsd = spec.gsd_m
    cols, rows = np.floor(x / gsd).astype(np.int64), np.floor(-y / gsd).astype(np.int64)
    col, row = int(cols.min()), int(rows.min())
    seen = truth(spec, col * gsd, -row * gsd, int(rows.max()) - row + 1, int(cols.max()) - col + 1)
    at = (rows - row, cols - col)
    seconds = _EPOCH_S + (j % 2**16 * 2**16 + i % 2**16) * 1e-6
    return _trace(x, y, seconds, draw, seen.chm[at], seen.dtm[at], seen.surface[at], seen.roof[at])


def _trace(
    x: np.ndarray, y: np.ndarray, seconds: np.ndarray, draw: np.ndarray,
    chm: np.ndarray, dtm: np.ndarray, surface: np.ndarray, roof: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Up to three returns per pulse: the surface, something inside the crown, and the ground below it."""
    crown = surface == TREE
    first = dtm + np.maximum(chm, roof)
    kind = np.where(crown, np.where(chm >= _HIGH_M, 5, 3), 2)
    kind[surface == ROOF], kind[surface == WATER] = 6, 9
    # Leaves let more light through than one thinks; tall crowns a little less.
    inside = crown & (chm > 3.0) & (draw[2] < 0.28)
    below = crown & (draw[3] < 0.34 - 0.006 * chm)
    count, one = 1 + inside + below, np.ones(len(x))
    depth = (0.15 + 0.75 * draw[4]) * chm
    parts = [
        (one > 0, first, kind, one),
        (inside, first - depth, np.where(chm - depth >= _HIGH_M, 5, 3), 2 * one),
        (below, dtm, 2 * one, count),
    ]
    lost = ((surface == WATER) & (draw[5] < 0.7)) | (draw[5] > 0.995)
    flown = []
    for n, (keep, z, kinds, number) in enumerate(parts):
        # Three sums of uniforms make a bell; each return has its own error.
        bell = sum(((draw[6] * (7 + 10 * n + k)) % 1.0 for k in range(3)), -1.5) * 2.0
        columns = (x, y, z + RANGE_SIGMA_M * bell, kinds, number, count, seconds)
        flown.append(np.rec.fromarrays([column[keep & ~lost] for column in columns], dtype=_RETURN))
    # Birds and multipath: about one pulse in three thousand, far above or below everything.
    odd = (draw[7] < 3e-4) & ~lost
    off = np.where(draw[4] < 0.5, 25.0 + 60.0 * draw[3], -6.0 - 12.0 * draw[3])
    columns = (x, y, np.where(off > 0, first, dtm) + off, 7 * one, one, one, seconds + 5e-7)
    flown.append(np.rec.fromarrays([column[odd] for column in columns], dtype=_RETURN))
    together = np.concatenate(flown)
    return together[np.lexsort((together["number"], together["seconds"]))]


def write_points(
    path: Path, spec: SceneSpec, grid: Grid, origin_xy: tuple[float, float], day: date, progress: Progress
) -> dict[str, int]:
    """Write the LAZ file (format 6, cm) of the scene on `grid`; returns counts by class name and in total.

    Memory does not depend on the scene's size: points go out block by block, in the blocks' fixed order.
    """
    import laspy
    from pyproj import CRS

    (west, south, east, north), (ox, oy) = grid.bounds, origin_xy
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.add_crs(CRS.from_wkt(grid.crs.to_wkt()))
    header.scales = np.array([0.01, 0.01, 0.01])
    header.offsets = np.array([np.floor(west), np.floor(south), 0.0])
    header.creation_date = day
    header.generating_software, header.system_identifier = "canopy", "synthetic scene"
    plane = (west - ox, south - oy, east - ox, north - oy)
    totals = dict.fromkeys(CLASSES.values(), 0)
    with laspy.open(path, mode="w", header=header, laz_backend=laspy.LazBackend.Lazrs) as writer:
        for block in blocks(plane):
            flown = returns_in(spec, block, plane)
            points = laspy.ScaleAwarePointRecord.zeros(len(flown), header=header)
            # Whole centimetres may round over the scene's edge: keep every point inside it.
            points.x = np.clip(flown["x"] + ox, west, east - 0.01)
            points.y = np.clip(flown["y"] + oy, south + 0.01, north)
            points.z, points.gps_time = flown["z"], flown["seconds"]
            points.classification = flown["kind"]
            points.return_number, points.number_of_returns = flown["number"], flown["count"]
            places = np.searchsorted([3, 5, 6, 7, 9], flown["kind"], "right")
            points.intensity = np.choose(places, _INTENSITY)
            if len(flown):
                writer.write_points(points)
            for code, name in CLASSES.items():
                totals[name] += int((flown["kind"] == code).sum())
            progress.advance()
    return {"total": sum(totals.values()), **totals}
