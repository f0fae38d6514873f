"""What a LAS, LAZ or COPC file says of itself: how many points, where, and in which units.

Feet are the trap of this format: many American files count x and y in US survey feet and z in either foot,
and some say so only in the WKT, others only in GeoTIFF keys. Everything after this module is in metres.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
from odc.geo import CRS
from pyproj.exceptions import CRSError

from canopy.errors import CanopyError, DataError, MissingDependencyError
from canopy.geo.crs import to_crs, transformer

METRES = {"m": 1.0, "ft": 0.3048, "us-ft": 1200 / 3937}
_SPELLED = {"m": "metres", "ft": "international feet", "us-ft": "US survey feet"}
# GeoTIFF keys of the vertical part (OGC 19-008r4) and EPSG's codes for the three units.
_VERTICAL_CRS_KEY, _VERTICAL_UNIT_KEY = 4096, 4099
_EPSG_UNITS = {9001: METRES["m"], 9002: METRES["ft"], 9003: METRES["us-ft"]}
# A file may lie this far, in degrees, outside the area its CRS is meant for; more is the wrong CRS.
_AREA_SLACK_DEG = 5.0


@dataclass(frozen=True)
class LidarFile:
    """A point cloud on disk. `bounds` are (west, south, east, north) in `crs`, as the header has them.

    `z_to_m` turns elevations into metres; `has_dates`: GPS times count from an epoch, not from
    a week's start. `notes` are what the user should know about how it was read.
    """

    path: Path
    points: int
    crs: CRS
    z_to_m: float
    bounds: tuple[float, float, float, float]
    point_format: int
    is_copc: bool
    has_dates: bool
    notes: tuple[str, ...] = ()


def require_lidar() -> None:
    """Raises MissingDependencyError where LAZ cannot be read."""
    try:
        import laspy  # noqa: F401
        import lazrs  # noqa: F401 - laspy finds it by itself
    except ImportError as error:
        raise MissingDependencyError(
            f"point clouds need {error.name}", remedy="run: pip install 'canopy-height[lidar]'"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a broken file makes laspy or lazrs raise, as one DataError that names it."""
    try:
        yield
    except CanopyError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the Rust decoder is not even an Exception
        reason = " ".join(str(error).split())[:160] or type(error).__name__
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
            axis, else the unit of x and y (the ASPRS rule), else metres, and leaves a note.

    Raises:
        DataError: no such file, no points, not a point cloud, no CRS, or a CRS that cannot be right.
    """
    path = Path(path)
    if units != "auto" and units not in METRES:
        raise DataError(f"unit {units!r}", where="--units", expected="auto, m, ft or us-ft")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise DataError(what, where=path, expected="a LAS, LAZ or COPC file")
    require_lidar()
    import laspy

    with reading(path), laspy.open(path) as reader:
        header = reader.header
        if header.point_count < 1:
            raise DataError("no points in it", where=path, remedy="leave the file out")
        stated = _stated_crs(header)
        keys = _geo_keys(header)
        is_copc = bool(header.vlrs.get("CopcInfoVlr"))
        bounds = (header.mins[0], header.mins[1], header.maxs[0], header.maxs[1])
        count, kind = int(header.point_count), int(header.point_format.id)
        dated = kind not in (0, 2) and int(header.global_encoding.gps_time_type) == 1
    horizontal = _horizontal(path, stated, crs)
    limits = _check_bounds(path, tuple(float(v) for v in bounds), horizontal)
    z_to_m, notes = _vertical_unit(path, stated, keys, horizontal, units)
    return LidarFile(path, count, horizontal, z_to_m, limits, kind, is_copc, dated, notes)


def _stated_crs(header: Any) -> pyproj.CRS | None:
    """The CRS of the VLRs with its vertical part, WKT before GeoTIFF keys; None if there is none."""
    try:
        return header.parse_crs()
    except CRSError:
        return None  # an unreadable one is as good as none: --crs can replace it


def _geo_keys(header: Any) -> dict[int, int]:
    """GeoTIFF keys whose value stands in the directory itself."""
    found: dict[int, int] = {}
    for record in header.vlrs.get("GeoKeyDirectoryVlr"):
        found |= {int(k.id): int(k.value_offset) for k in record.geo_keys if k.tiff_tag_location == 0}
    return found


def _horizontal(path: Path, stated: pyproj.CRS | None, given: Any) -> CRS:
    if stated is None and given is None:
        raise DataError(
            "no coordinate reference system in the file",
            where=path,
            remedy="name it with --crs, e.g. --crs EPSG:26917",
        )
    crs = to_crs(given if stated is None else stated)
    if not (crs.proj.is_projected or crs.proj.is_geographic):
        if given is not None:
            return to_crs(given)
        raise DataError(
            f"{str(crs)[:60]} is a local coordinate system", where=path, remedy="name the true one with --crs"
        )
    return crs


def _check_bounds(path: Path, bounds: tuple[float, ...], crs: CRS) -> tuple[float, float, float, float]:
    """Bounds that are numbers, in order, and on the part of the Earth that the CRS is for."""
    west, south, east, north = bounds
    if not all(math.isfinite(v) for v in bounds) or west > east or south > north:
        raise DataError(f"bounds {bounds} in the header", where=path, expected="min before max")
    lon, lat = transformer(crs, "EPSG:4326").transform((west + east) / 2, (south + north) / 2)
    text = f"{crs}: x {west:.10g} to {east:.10g}, y {south:.10g} to {north:.10g}"
    remedy = "the CRS is not that of the points; name the right one with --crs"
    if not (math.isfinite(lon) and math.isfinite(lat)) or abs(lat) > 90:
        raise DataError(f"points off the Earth in {text}", where=path, remedy=remedy)
    area = crs.proj.area_of_use
    if area is not None:
        slack = _AREA_SLACK_DEG
        span = (area.east - area.west) % 360.0 or 360.0
        outside_x = (lon - area.west + slack) % 360.0 > span + 2 * slack
        if (outside_x and span + 2 * slack < 360) or not area.south - slack <= lat <= area.north + slack:
            raise DataError(
                f"points at latitude {lat:.2f}, longitude {lon:.2f} in {text}",
                where=path,
                expected=f"{area.name[:60]}",
                remedy=remedy,
            )
    return west, south, east, north


def _vertical_unit(
    path: Path, stated: pyproj.CRS | None, keys: dict[int, int], horizontal: CRS, units: str
) -> tuple[float, tuple[str, ...]]:
    """Metres in one unit of z, and what to say about it."""
    told = _told_unit(stated, keys)
    if units != "auto":
        factor = METRES[units]
        if told is not None and abs(told / factor - 1) > 1e-9:
            return factor, (f"{path.name}: says {_name(told)} for z, read as {_name(factor)} as asked",)
        return factor, ()
    if told is not None:
        return told, ()
    factor = 1.0
    if horizontal.proj.is_projected:
        factor = _nearest_unit(float(horizontal.proj.axis_info[0].unit_conversion_factor))
    if abs(factor - 1) < 1e-9:
        return 1.0, ()
    return factor, (f"{path.name}: no unit for z, read as {_name(factor)} like x and y; else use --units",)


def _told_unit(stated: pyproj.CRS | None, keys: dict[int, int]) -> float | None:
    """Metres per unit of the vertical axis where the file states one."""
    if stated is not None:
        for axis in (a for part in [stated, *stated.sub_crs_list] for a in part.axis_info):
            if axis.direction.lower() in ("up", "down") and axis.unit_conversion_factor > 0:
                return _nearest_unit(float(axis.unit_conversion_factor))
    if keys.get(_VERTICAL_UNIT_KEY) in _EPSG_UNITS:
        return _EPSG_UNITS[keys[_VERTICAL_UNIT_KEY]]
    code = keys.get(_VERTICAL_CRS_KEY, 0)
    if 1024 <= code <= 32766:
        try:
            axes = pyproj.CRS.from_epsg(code).axis_info
        except CRSError:
            return None
        return _nearest_unit(float(axes[0].unit_conversion_factor)) if axes else None
    return None


def _nearest_unit(factor: float) -> float:
    """The exact factor of a known unit, for one that was rounded in print."""
    best = min(METRES.values(), key=lambda m: abs(m / factor - 1))
    return best if abs(best / factor - 1) < 5e-7 else factor


def _name(factor: float) -> str:
    for short, metres in METRES.items():
        if abs(metres / factor - 1) < 5e-7:
            return _SPELLED[short]
    return f"units of {factor:g} m"


def bounds_in(file: LidarFile, crs: CRS) -> tuple[float, float, float, float]:
    """The file's rectangle in another CRS, its edges followed; exact when the CRS is the file's own."""
    if file.crs == crs:
        return file.bounds
    west, south, east, north = transformer(file.crs, crs).transform_bounds(*file.bounds, densify_pts=64)
    if not np.isfinite([west, south, east, north]).all():
        raise DataError(f"cannot be placed in {crs}", where=file.path, remedy="choose another --crs")
    return west, south, east, north
