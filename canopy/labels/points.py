"""What a LAS, LAZ or COPC file says of itself: how many points, where, and in which units.

Feet are the trap of this format: many American files count x and y in US survey feet and z in either foot,
and some say so only in the WKT, others only in GeoTIFF keys. Everything after this module is in metres.

Point clouds read once, chunk by chunk, and sorted on disk into blocks of a fixed global lattice.

Memory does not depend on the files' size: a chunk is decoded, brought to metres in the output CRS, and
appended to the files of the blocks it meets. A block's points keep the order of the input, so a block's file
does not depend on which other blocks were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
from odc.geo import CRS
from pyproj.exceptions import CRSError

from canopy.errors import CanopyError, DataError, MissingDependencyError
from canopy.geo.crs import to_crs, transformer
from canopy.runtime import Progress

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


CHUNK_POINTS = 500_000
# What a return is to a canopy model. ASPRS LAS 1.4 classes; 64-67 as IGN's LiDAR HD uses them.
OTHER, GROUND, BUILDING, WATER, BRIDGE, WIRE, NOISE = range(7)
KIND_OF_CLASS = np.full(256, OTHER, np.uint8)
for _kind, _classes in {
    GROUND: (2,),
    BUILDING: (6, 64, 67),  # 64, 67: lasting structures that are no building
    WATER: (9,),
    BRIDGE: (17, 19),  # 19: overhead structure, e.g. a gantry or conveyor
    WIRE: (13, 14, 15, 16),
    NOISE: (7, 18, 65, 66),  # 65: artefact, 66: virtual point that no pulse returned
}.items():
    KIND_OF_CLASS[list(_classes)] = _kind
_MODEL_KEY = 8  # ground thinned for modelling; LAS 1.4 formats reserve the number
_UNCLASSIFIED = np.isin(np.arange(256), (0, 1, 7, 12, 18))

RECORD = np.dtype([("x", "f8"), ("y", "f8"), ("z", "f4"), ("kind", "u1")])


@dataclass(frozen=True)
class Blocks:
    """Squares of `side_px` pixels on the global lattice of `pixel` metres; (row, col), rows southward."""

    pixel: float
    side_px: int

    @property
    def side_m(self) -> float:
        """Side of a block, metres."""
        return self.side_px * self.pixel

    def cells(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global (row, col) of the pixels that hold the points; west and north edges belong to a pixel."""
        return np.floor(-y / self.pixel).astype(np.int64), np.floor(x / self.pixel).astype(np.int64)

    def over(self, row: int, col: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(first row, first col, last row, last col) of the blocks that meet a window of pixels."""
        n = self.side_px
        return row // n, col // n, (row + height - 1) // n, (col + width - 1) // n

    def window(self, block: tuple[int, int]) -> tuple[int, int, int, int]:
        """(row, col, height, width) of a block in pixels."""
        return block[0] * self.side_px, block[1] * self.side_px, self.side_px, self.side_px


@dataclass
class Tally:
    """What the reader met: points by fate, and how many were classified, per file."""

    points: int = 0
    dropped: int = 0
    ground: int = 0
    classified: list[bool] = field(default_factory=list)
    first_s: float = math.inf
    last_s: float = -math.inf


class Spool:
    """Block files in a folder: what `fill` wrote, any process can read by block or by rectangle."""

    def __init__(self, folder: Path, blocks: Blocks) -> None:
        self.folder, self.blocks = folder, blocks

    def path(self, block: tuple[int, int], kind: str = "points") -> Path:
        """The file of a block."""
        return self.folder / f"{kind}_{block[0]}_{block[1]}"

    def append(self, points: np.ndarray, limits: tuple[int, int, int, int]) -> None:
        """Sort a chunk of RECORDs into its blocks; those beyond `limits` (blocks, inclusive) are left out."""
        row, col = self.blocks.cells(points["x"], points["y"])
        i, j = row // self.blocks.side_px, col // self.blocks.side_px
        inside = (i >= limits[0]) & (j >= limits[1]) & (i <= limits[2]) & (j <= limits[3])
        points, i, j = points[inside], i[inside], j[inside]
        if not len(points):
            return
        width = limits[3] - limits[1] + 1
        key = (i - limits[0]) * width + (j - limits[1])
        order = np.argsort(key, kind="stable")
        points, key = points[order], key[order]
        starts = np.flatnonzero(np.r_[True, np.diff(key) > 0])
        for start, stop in zip(starts, np.r_[starts[1:], len(key)], strict=True):
            block = (int(key[start]) // width + limits[0], int(key[start]) % width + limits[1])
            with self.path(block).open("ab") as file:
                points[start:stop].tofile(file)

    def load(self, block: tuple[int, int], margin_m: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """RECORDs of a block followed by those within `margin_m` of it; and bool: is it the block's own."""
        n, px = self.blocks.side_px, self.blocks.pixel
        reach = math.ceil(margin_m / self.blocks.side_m)
        top, left = block[0] * n * px - margin_m, block[1] * n * px - margin_m
        side = self.blocks.side_m + 2 * margin_m
        parts, own = [self._read(block)], 0
        own = len(parts[0])
        for i in range(block[0] - reach, block[0] + reach + 1):
            for j in range(block[1] - reach, block[1] + reach + 1):
                if (i, j) == block:
                    continue
                near = self._read((i, j))
                u, v = near["x"] - left, -near["y"] - top
                parts.append(near[(u >= 0) & (u < side) & (v >= 0) & (v < side)])
        points = np.concatenate(parts)
        return points, np.arange(len(points)) < own

    def _read(self, block: tuple[int, int]) -> np.ndarray:
        path = self.path(block)
        return np.fromfile(path, RECORD) if path.exists() else np.zeros(0, RECORD)


def fill(
    spool: Spool,
    files: Sequence[LidarFile],
    crs: CRS,
    limits: tuple[int, int, int, int],
    progress: Progress,
) -> Tally:
    """Stream every file once into the spool; see the module's head.

    Points of noise classes and withheld points are dropped. Of a COPC file only the nodes that meet the
    blocks are decoded. `limits`: first row, first col, last row, last col of blocks. Raises DataError.
    """
    tally = Tally()
    for file in files:
        known = False
        for raw in _chunks(file, crs, spool.blocks, limits):
            points, classes = _record(file, raw, crs)
            known |= not _UNCLASSIFIED[classes].all()
            keep = points["kind"] != NOISE
            tally.points += len(points)
            tally.dropped += int((~keep).sum())
            tally.ground += int((points["kind"] == GROUND).sum())
            _note_time(tally, file, raw)
            spool.append(points[keep], limits)
            progress.advance(len(points))
        tally.classified.append(known)
    return tally


def _chunks(file: LidarFile, crs: CRS, blocks: Blocks, limits: tuple[int, int, int, int]) -> Iterator[Any]:
    """laspy's chunks of a file. Raises DataError for one that ends early."""
    import laspy

    if file.is_copc and not _holds(file, crs, blocks, limits):
        yield from _copc_chunks(file, crs, blocks, limits)
        return
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


def _area(blocks: Blocks, limits: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
    """(west, south, east, north) of a range of blocks, metres."""
    side = blocks.side_m
    return limits[1] * side, -(limits[2] + 1) * side, (limits[3] + 1) * side, -limits[0] * side


def _holds(file: LidarFile, crs: CRS, blocks: Blocks, limits: tuple[int, int, int, int]) -> bool:
    """Whether the blocks hold the whole file, so that reading it from end to end wastes nothing."""
    west, south, east, north = bounds_in(file, crs)
    w, s, e, n = _area(blocks, limits)
    return west >= w and south >= s and east < e and north <= n


def _copc_chunks(
    file: LidarFile, crs: CRS, blocks: Blocks, limits: tuple[int, int, int, int]
) -> Iterator[Any]:
    """Points of a COPC file block by block, so that memory holds one block's at a time."""
    import laspy
    from laspy.copc import Bounds

    with reading(file.path), laspy.CopcReader.open(str(file.path)) as reader:
        slack = float(max(reader.header.scales[:2]))
        for i in range(limits[0], limits[2] + 1):
            for j in range(limits[1], limits[3] + 1):
                w, s, e, n = _area(blocks, (i, j, i, j))
                if file.crs != crs:
                    w, s, e, n = transformer(crs, file.crs).transform_bounds(w, s, e, n, densify_pts=21)
                west, south, east, north = file.bounds
                if w > east or e < west or s > north or n < south:
                    continue
                box = Bounds(
                    np.array([max(w, west) - slack, max(s, south) - slack]),
                    np.array([min(e, east) + slack, min(n, north) + slack]),
                )
                points = reader.query(box)
                x, y = np.array(points.x), np.array(points.y)
                if file.crs != crs:
                    x, y = transformer(file.crs, crs).transform(x, y)
                row, col = blocks.cells(np.asarray(x), np.asarray(y))
                mine = (row // blocks.side_px == i) & (col // blocks.side_px == j)
                if mine.any():
                    yield points[mine]


def _record(file: LidarFile, raw: Any, crs: CRS) -> tuple[np.ndarray, np.ndarray]:
    """RECORDs in metres of a laspy chunk, and its LAS classes."""
    with reading(file.path):
        x, y = np.array(raw.x, np.float64), np.array(raw.y, np.float64)
        z, classes = np.array(raw.z, np.float64), np.array(raw.classification, np.uint8)
        withheld = np.array(raw.withheld, bool)
        slack = 2.0 * float(max(raw.scales[:2]))
    west, south, east, north = file.bounds
    if x.min() < west - slack or x.max() > east + slack or y.min() < south - slack or y.max() > north + slack:
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


def _note_time(tally: Tally, file: LidarFile, raw: Any) -> None:
    """First and last GPS second, where the points have one that names a date."""
    if file.has_dates:
        seconds = np.array(raw.gps_time)
        tally.first_s = min(tally.first_s, float(seconds.min()))
        tally.last_s = max(tally.last_s, float(seconds.max()))
