"""Point clouds: what a LAS, LAZ or COPC file says of itself, and its points sorted on disk by place.

Feet are the trap of this format: many American files count x and y in US survey feet and z in either foot,
and some say so only in the WKT, others only in GeoTIFF keys. Everything after this module is in metres.

Memory does not depend on the files' size: a chunk is decoded, brought to metres in the output CRS, and
appended to the files of the squares that it meets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
from odc.geo import CRS
from pyproj.exceptions import CRSError

from canopy.errors import CanopyError, DataError, require
from canopy.geo.crs import ground_crs, metres_per_unit, to_crs, transformer
from canopy.geo.units import FOOT, US_FOOT
from canopy.labels.surface import GROUND, KIND_OF_CLASS, NOISE
from canopy.runtime import Progress, log

Bounds = tuple[float, float, float, float]

METRES = {"m": 1.0, "ft": FOOT, "us-ft": US_FOOT}
# GeoTIFF keys of the vertical part (OGC 19-008r4) and EPSG's codes for the three units.
_VERTICAL_CRS_KEY, _VERTICAL_UNIT_KEY = 4096, 4099
_EPSG_UNITS = {9001: METRES["m"], 9002: METRES["ft"], 9003: METRES["us-ft"]}
# A file may lie this far, in degrees, outside the area its CRS is meant for; more is the wrong CRS.
_AREA_SLACK_DEG = 5.0

# Elevations beyond the Earth's are a nodata value that no file declares, or damage.
LOWEST_M, HIGHEST_M = -500.0, 9_000.0

CHUNK_POINTS = 500_000
_MODEL_KEY = 8  # ground thinned for modelling; LAS 1.4 formats reserve the number
_UNCLASSIFIED = np.isin(np.arange(256), (0, 1, 7, 12, 18))

RECORD = np.dtype([("x", "f8"), ("y", "f8"), ("z", "f4"), ("kind", "u1")])


# ---- headers ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class LidarFile:
    """A point cloud on disk. `bounds` are (west, south, east, north) in `crs`, and `z` the lowest and highest
    elevation in the file's unit, as the header has them.

    `z_to_m` turns elevations into metres; `has_dates`: GPS times count from an epoch, not from
    a week's start.
    """

    path: Path
    points: int
    crs: CRS
    z_to_m: float
    bounds: Bounds
    z: tuple[float, float]
    point_format: int
    has_dates: bool


def require_lidar() -> None:
    """Raises MissingDependencyError where LAZ cannot be read."""
    require("point clouds", "canopy-height[lidar]", "laspy", "lazrs")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a broken file makes laspy or lazrs raise, as one DataError that names it."""
    try:
        yield
    except (CanopyError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the Rust decoder is not even an Exception
        reason = str(error)[:160] or type(error).__name__
        raise DataError(
            f"unreadable point cloud ({reason})",
            where=path,
            expected="a whole LAS, LAZ or COPC file",
            remedy="it is truncated, damaged or another format; fetch it again",
        ) from error


def open_lidar(path: str | Path, *, crs: Any = None, units: str = "auto") -> LidarFile:
    """Read the header of a LAS, LAZ or COPC file.

    Args:
        path: a local file.
        crs: CRS of x and y for a file that names none.
        units: unit of the elevations, `m`, `ft` or `us-ft`; `auto` takes what the file says of its vertical
            axis, else the unit of x and y (the ASPRS rule), else metres, and says so.

    Raises:
        DataError: no such file, no points, not a point cloud, no CRS, or a CRS that cannot be right.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise DataError(what, where=path, expected="a LAS, LAZ or COPC file")
    require_lidar()
    import laspy

    with reading(path):
        _check_records(path)
    with reading(path), laspy.open(path) as reader:
        header = reader.header
        if header.point_count < 1:
            raise DataError("no points in it", where=path, remedy="leave the file out")
        try:
            stated = header.parse_crs()
        except CRSError:
            stated = None  # an unreadable one is as good as none: --crs can replace it
        told = _told_unit(stated, header)
        west, south, east, north = (float(v) for v in (*header.mins[:2], *header.maxs[:2]))
        z = float(header.mins[2]), float(header.maxs[2])
        count, kind = int(header.point_count), int(header.point_format.id)
        dated = kind not in (0, 2) and int(header.global_encoding.gps_time_type) == 1
    if stated is not None and (stated.is_projected or stated.is_geographic):
        horizontal = to_crs(stated)
    elif crs is not None:
        horizontal = ground_crs(crs, "--crs")
    else:
        raise DataError(
            "no coordinate reference system in the file" if stated is None else f"a local CRS, {stated.name}",
            where=path,
            remedy="name it with --crs, e.g. --crs EPSG:26917",
        )
    _check_place(path, (west, south, east, north), horizontal)
    z_to_m = vertical_unit(path.name, told, horizontal, units)
    return LidarFile(path, count, horizontal, z_to_m, (west, south, east, north), z, kind, dated)


def _check_records(path: Path) -> None:
    """Refuse a header that promises more records than the file can hold: laspy would read on for hours."""
    with open(path, "rb") as file:
        first = file.read(104)
    if int.from_bytes(first[100:104], "little") * 54 > path.stat().st_size:  # 54 bytes head each
        raise ValueError("a damaged header")


def _check_place(path: Path, bounds: Bounds, crs: CRS) -> None:
    """Refuse bounds that are not on the part of the Earth that the CRS is for."""
    west, south, east, north = bounds
    lon, lat = transformer(crs, "EPSG:4326").transform((west + east) / 2, (south + north) / 2)
    area, slack = crs.proj.area_of_use, _AREA_SLACK_DEG
    w, s, e, n = area.bounds if area else (-180.0, -90.0, 180.0, 90.0)
    within = (lon - w + slack) % 360.0 <= ((e - w) % 360.0 or 360.0) + 2 * slack
    if not (within and s - slack <= lat <= n + slack):  # also for infinite numbers
        raise DataError(
            f"points at latitude {lat:.2f}, longitude {lon:.2f} in {crs}: x {west:.10g} to {east:.10g}, "
            f"y {south:.10g} to {north:.10g}",
            where=path,
            expected=area.name[:60] if area else "a place on the Earth",
            remedy="the CRS is not that of the points; name the right one with --crs",
        )


def _told_unit(stated: pyproj.CRS | None, header: Any) -> float | None:
    """Metres per unit of the vertical axis where a file states one, in its WKT or its GeoTIFF keys."""
    keys: dict[int, int] = {}
    for record in header.vlrs.get("GeoKeyDirectoryVlr"):
        keys |= {int(k.id): int(k.value_offset) for k in record.geo_keys if k.tiff_tag_location == 0}
    if keys.get(_VERTICAL_UNIT_KEY) in _EPSG_UNITS:
        return _EPSG_UNITS[keys[_VERTICAL_UNIT_KEY]]
    parts = [stated, *stated.sub_crs_list] if stated is not None else []
    with suppress(CRSError):  # no code, or one that names no CRS
        parts.append(pyproj.CRS.from_epsg(keys.get(_VERTICAL_CRS_KEY, 0)))
    axes = (axis for part in parts for axis in part.axis_info)
    factors = (a.unit_conversion_factor for a in axes if a.direction.lower() in ("up", "down"))
    return next((float(factor) for factor in factors if factor > 0), None)


def vertical_unit(name: str, told: float | None, crs: CRS, units: str) -> float:
    """Metres in one unit of z: as asked, as the file says, else as x and y are counted; said where unsure."""
    if units != "auto":
        if told is not None and abs(told / METRES[units] - 1) > 1e-6:
            log.warning(f"note: {name}: its z is in units of {told:.7g} m, read in {units} as asked")
        return METRES[units]
    if told is not None:
        return told
    factor = metres_per_unit(crs) if crs.proj.is_projected else 1.0
    if abs(factor - 1) > 1e-9:
        log.warning(
            f"note: {name}: no unit for z, read in units of {factor:.7g} m like x and y; else use --units"
        )
    return factor


# ---- points on disk ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Spool:
    """Points in files of a folder, one for each square of `side_m` metres, counted from the CRS's origin. Any
    process can read them by bounds."""

    folder: Path
    side_m: float

    def append(self, points: np.ndarray, bounds: Bounds) -> None:
        """Sort a chunk of RECORDs into its squares; those outside the bounds are left out."""
        points = points[_within(points, bounds)]
        i, j = (np.floor(points[axis] / self.side_m).astype(np.int64) for axis in "yx")
        order = np.lexsort((j, i))  # stable: the input's order stays
        points, i, j = points[order], i[order], j[order]
        edges = np.flatnonzero((np.diff(i) != 0) | (np.diff(j) != 0)) + 1
        for part, first in zip(np.split(points, edges), [0, *edges.tolist()], strict=True):
            if len(part):
                with self._path(i[first], j[first]).open("ab") as file:
                    part.tofile(file)

    def load(self, bounds: Bounds) -> np.ndarray:
        """RECORDs of all points within the bounds."""
        west, south, east, north = (math.floor(edge / self.side_m) for edge in bounds)
        parts = [np.zeros(0, RECORD)]
        for i, j in itertools.product(range(south, north + 1), range(west, east + 1)):
            if self._path(i, j).exists():
                near = np.fromfile(self._path(i, j), RECORD)
                parts.append(near[_within(near, bounds)])
        return np.concatenate(parts)

    def _path(self, i: int, j: int) -> Path:
        return self.folder / f"points_{i}_{j}"


def _within(points: np.ndarray, bounds: Bounds) -> np.ndarray:
    west, south, east, north = bounds
    x, y = points["x"], points["y"]
    return (x >= west) & (x < east) & (y > south) & (y <= north)


@dataclass
class Tally:
    """What the reader met: points by fate, whether every file is classified, first and last GPS second."""

    points: int = 0
    dropped: int = 0
    ground: int = 0
    classified: bool = True
    first_s: float = math.inf
    last_s: float = -math.inf


def fill(spool: Spool, files: Sequence[LidarFile], crs: CRS, bounds: Bounds, progress: Progress) -> Tally:
    """Stream every file once into the spool; see the module's head.

    Points of noise classes and withheld points are dropped, and those outside the bounds. Raises
    DataError.
    """
    tally = Tally()
    for file in files:
        known = False
        for raw in _chunks(file):
            points, classes = _record(file, raw, crs)
            known |= not _UNCLASSIFIED[classes].all()
            keep = points["kind"] != NOISE
            tally.points += len(points)
            tally.dropped += int((~keep).sum())
            tally.ground += int((points["kind"] == GROUND).sum())
            if file.has_dates:
                seconds = np.array(raw.gps_time)
                tally.first_s = min(tally.first_s, float(seconds.min()))
                tally.last_s = max(tally.last_s, float(seconds.max()))
            spool.append(points[keep], bounds)
            progress.advance(len(points))
        tally.classified &= known
    return tally


def _chunks(file: LidarFile) -> Iterator[Any]:
    """laspy's chunks of a file. Raises DataError for one that ends early."""
    import laspy

    seen = 0
    with reading(file.path), laspy.open(file.path) as reader:
        for chunk in reader.chunk_iterator(CHUNK_POINTS):
            seen += len(chunk)
            yield chunk
    if seen != file.points:
        raise DataError(
            f"{seen} points where the header promises {file.points}",
            where=file.path,
            remedy="the file is truncated; fetch it again",
        )


def _record(file: LidarFile, raw: Any, crs: CRS) -> tuple[np.ndarray, np.ndarray]:
    """RECORDs in metres of a laspy chunk, and its LAS classes."""
    with reading(file.path):
        x, y = np.array(raw.x, np.float64), np.array(raw.y, np.float64)
        z, classes = np.array(raw.z, np.float64), np.array(raw.classification, np.uint8)
        withheld = np.array(raw.withheld, bool)
        slack = 2.0 * float(max(raw.scales[:2]))
    west, south, east, north = file.bounds
    outside = x.min() < west - slack or x.max() > east + slack or y.min() < south - slack
    # A header may lie about elevations (of a cloud that was normalised), but none is beyond the Earth's.
    wild = z[(z < file.z[0] - slack) | (z > file.z[1] + slack)] * file.z_to_m
    if outside or y.max() > north + slack or np.any((wild < LOWEST_M) | (wild > HIGHEST_M)):
        raise DataError(
            "points outside the bounds that the header states",
            where=file.path,
            remedy="the header or the points are damaged; repair the header or fetch the file again",
        )
    if file.crs != crs:
        x, y = transformer(file.crs, crs).transform(x, y)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise DataError(f"points that cannot be placed in {crs}", where=file.path)
    points = np.empty(len(x), RECORD)
    points["x"], points["y"], points["z"] = x, y, z * file.z_to_m
    kinds = KIND_OF_CLASS[classes]
    if file.point_format < 6:
        kinds[classes == _MODEL_KEY] = GROUND
    points["kind"] = np.where(withheld, NOISE, kinds)
    return points, classes
