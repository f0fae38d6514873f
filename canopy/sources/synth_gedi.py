"""GEDI-like shots of the synthetic forest, in the layout of a GEDI L2A version 2 granule.

Relative heights: RH p is the p-th percentile of the true heights above ground of all pixels whose centre lies
in the 25 m disc at the shot's TRUE position, ground pixels counting with 0 m. (Real RH are percentiles of the
waveform's energy, Dubayah et al. 2020; here every pixel of the disc returns the same energy, from its top.)
RH100 is the disc's highest pixel, RH0 its lowest. What real shots suffer from is planted: position errors,
and shots that each filter flag must catch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from canopy.errors import MissingDependencyError
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.runtime import Progress
from canopy.sources.synth import ROOF, WATER, SceneSpec
from canopy.sources.synth_render import truth

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


def require_h5py() -> None:
    """Raises MissingDependencyError where HDF5 cannot be written."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            f"GEDI files need {error.name}", remedy="run: pip install 'canopy-height[lidar,gedi]'"
        ) from error
    del h5py


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
