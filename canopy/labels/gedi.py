"""Which GEDI shots are good enough, by named filters, and how much a shot counts in training.

strict: quality_flag = 1, degrade_flag = 0, sensitivity above 0.95 (0.98 within the tropics, where the canopy
    is denser), landsat_water_persistence below 10 %, urban_proportion below 50 %. For training and scores.
loose: sensitivity at least 0.5, that of algorithm setting 2 above 0.7, and the ground within 150 m of the
    digital elevation model. For maps of large areas, where numbers make up for noise.
none: every shot that has a place.

A missing value never passes. A rejected shot is counted once, under the first criterion that it fails.

What GEDI granules call things: beams, and the variables of Level 2A, 2B and 4A, versions 2 and 3.

A variable is looked for under several names, first match first, so that a granule's version is told by what
it holds and never by its file name. Version 3 renamed the quality flags (`l2a_quality_flag_rel3`; a plain
`quality_flag`, where one remains beside it, means less) and moved Level 2B's coordinates to the beam's root.
Data dictionaries: GEDI L2A and L2B product data dictionaries (LP DAAC), GEDI04_A user guide (ORNL DAAC).

Opening GEDI granules and reading their beams piece by piece.

Only what is asked for is read: columns of one number per shot in blocks, and of the 101 relative heights the
wanted columns of the wanted shots, along the HDF5 chunks that hold them.

Values of GEDI Levels 2B and 4A for shots of Level 2A, found by shot number.

What became of the GEDI shots that were read: counts, notes, and the error when nothing is left.

GEDI shots written to a GeoParquet file, in pieces and verified.

The file follows GeoParquet 1.0: a WKB point per shot in EPSG:4326 (the place of the lowest mode), and the
JSON that says so under the key `geo`. Under the key `canopy` lie the filter and the granules it was made of.
There is no wall-clock time in it: the same granules and options give the same bytes.

GEDI Level 2A granules -> one table of the shots worth using (GeoParquet).

Per beam and block of shots: places first, then the area, then the flags, and only then the wanted relative
heights of the shots that are left. A shot is a disc of some 25 m whose place is known to some 10 m: compare
it with a statistic over the disc (`canopy.sources.gedi_footprint`), never with a pixel. Dubayah et al. 2020,
The Global Ecosystem Dynamics Investigation, Science of Remote Sensing 1.

Reading tables of GEDI shots back: our GeoParquet, anybody's Parquet or CSV.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from canopy import __version__
from canopy.errors import AreaError, CanopyError, DataError, InputError, MissingDependencyError, OutputError
from canopy.files import check_name
from canopy.geo.area import AOI
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas
    import h5py
    import pandas
    import pyarrow as pa


Columns = Mapping[str, np.ndarray]
# Half the width of the tropics, degrees.
TROPICS_LAT = 23.44
# Coverage beams carry half the energy of the full-power ones (Dubayah et al. 2020).
BEAM_WEIGHT = {"full": 1.0, "coverage": 0.5}


@dataclass(frozen=True)
class Criterion:
    """A rule that a shot passes or not; `needs` are the columns it looks at."""

    name: str
    needs: tuple[str, ...]
    passes: Callable[[Columns], np.ndarray]


def _sensitive(shots: Columns) -> np.ndarray:
    return shots["sensitivity"] > np.where(np.abs(shots["lat"]) < TROPICS_LAT, 0.98, 0.95)


def _small(column: str, limit: int) -> Callable[[Columns], np.ndarray]:
    # Flags and shares of a missing value are -1.
    return lambda shots: (shots[column] >= 0) & (shots[column] < limit)


def _near_dem(shots: Columns) -> np.ndarray:
    return np.abs(shots["elev_lowestmode"] - shots["dem"]) < 150.0


FILTERS: dict[str, tuple[Criterion, ...]] = {
    "strict": (
        Criterion("quality_flag", ("quality_flag",), lambda shots: shots["quality_flag"] == 1),
        Criterion("degrade_flag", ("degrade_flag",), lambda shots: shots["degrade_flag"] == 0),
        Criterion("sensitivity", ("sensitivity",), _sensitive),
        Criterion("water", ("landsat_water_persistence",), _small("landsat_water_persistence", 10)),
        Criterion("urban", ("urban_proportion",), _small("urban_proportion", 50)),
    ),
    "loose": (
        Criterion("sensitivity", ("sensitivity",), lambda shots: shots["sensitivity"] >= 0.5),
        Criterion("sensitivity_a2", ("sensitivity_a2",), lambda shots: shots["sensitivity_a2"] > 0.7),
        Criterion("elevation", ("elev_lowestmode", "dem"), _near_dem),
    ),
    "none": (),
}


def filter_named(name: str) -> tuple[Criterion, ...]:
    """The criteria of a filter. Raises InputError for an unknown name."""
    if name not in FILTERS:
        raise InputError(f"no filter {name!r}", where="--filter", expected=", ".join(FILTERS))
    return FILTERS[name]


def apply_filter(
    criteria: tuple[Criterion, ...], shots: Columns, count: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Which of `count` shots pass, bool (count,), and how many each criterion was the first to reject."""
    good, rejected = np.ones(count, bool), {}
    for criterion in criteria:
        with np.errstate(invalid="ignore"):  # a comparison with a missing value is a rejection
            passed = good & criterion.passes(shots)
        rejected[criterion.name] = int(good.sum() - passed.sum())
        good = passed
    return good, rejected


def shot_weights(beam_type: str | None, sensitivity: np.ndarray) -> np.ndarray:
    """How much each shot counts in the footprint loss, float32 (n,) in 0..1; GEDI scores count all alike.

    The beam's share (full power 1, coverage 0.5) times a ramp in sensitivity, the canopy cover through which
    the pulse still reaches the ground: 0 at 0, 0.25 at 0.5 (the loose filter's limit), 1 from 0.95 up. A
    missing sensitivity counts as 0.5, an unknown beam as a coverage beam. Flags are the filters' business.
    """
    known = np.where(np.isfinite(sensitivity), sensitivity, 0.5)
    ramp = np.interp(known, [0.0, 0.5, 0.95], [0.0, 0.25, 1.0])
    return (BEAM_WEIGHT.get(beam_type or "", BEAM_WEIGHT["coverage"]) * ramp).astype(np.float32)


BEAM_NAME = re.compile(r"^BEAM[01]{4}$")
FULL_POWER = frozenset({"BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011"})
COVERAGE = frozenset({"BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011"})
# Seconds of `delta_time` are counted from 2018-01-01T00:00:00 UTC; this is that instant in Unix seconds.
EPOCH_UNIX_S = 1_514_764_800
# Fill values of GEDI's floats are -9999 and -999999.
FILL_BELOW = -9_998.5
RH_COUNT = 101


@dataclass(frozen=True)
class Variable:
    """One quantity per shot.

    Attributes:
        column: name of the output column.
        paths: names inside a beam's group, in the order they are looked for.
        kind: "number" (float64 while read), "flag" (small whole number, missing = -1) or "shot" (uint64).
        dtype: Arrow type of the output column.
        needed: whether a granule without it is refused.
    """

    column: str
    paths: tuple[str, ...]
    kind: str = "number"
    dtype: str = "float32"
    needed: bool = False


SHOT_NUMBER = Variable("shot_number", ("shot_number", "geolocation/shot_number"), "shot", "uint64", True)
LAT = Variable("lat", ("lat_lowestmode", "geolocation/lat_lowestmode"), dtype="float64", needed=True)
LON = Variable("lon", ("lon_lowestmode", "geolocation/lon_lowestmode"), dtype="float64", needed=True)
RH_PATH = "rh"
QUALITY_V3 = "l2a_quality_flag_rel3"

# Level 2A columns between the heights and the time, in the order of the output.
L2A = (
    Variable("sensitivity", ("sensitivity", "geolocation/sensitivity")),
    Variable("sensitivity_a2", ("geolocation/sensitivity_a2", "sensitivity_a2")),
    Variable("quality_flag", (QUALITY_V3, "quality_flag"), "flag", "uint8"),
    Variable("degrade_flag", ("degrade_flag", "geolocation/degrade_flag"), "flag", "uint8"),
    Variable("solar_elevation", ("solar_elevation", "geolocation/solar_elevation")),
    Variable("elev_lowestmode", ("elev_lowestmode", "geolocation/elev_lowestmode")),
    Variable("dem", ("digital_elevation_model", "geolocation/digital_elevation_model")),
    Variable(
        "landsat_water_persistence", ("land_cover_data/landsat_water_persistence",), "flag", "uint8"
    ),
    Variable("urban_proportion", ("land_cover_data/urban_proportion",), "flag", "uint8"),
)  # fmt: skip
TIME = Variable("time", ("delta_time", "geolocation/delta_time"), dtype="time")

# Level 2B: canopy cover (0..1) and plant area index (m2/m2). Level 4A: aboveground biomass density (Mg/ha).
L2B = (
    Variable("cover", ("cover",)),
    Variable("pai", ("pai",)),
    Variable("l2b_quality_flag", ("l2b_quality_flag_rel3", "l2b_quality_flag"), "flag", "uint8"),
)
L4A = (
    Variable("agbd", ("agbd",)),
    Variable("l4_quality_flag", ("l4a_quality_flag_rel3", "l4_quality_flag"), "flag", "uint8"),
)
COMPANIONS = {"L2B": L2B, "L4A": L4A}


def beam_type(name: str, description: str | None) -> str | None:
    """`full` or `coverage`: by the group's `description`, else by the known names; None if neither tells."""
    text = (description or "").lower()
    for word in ("full", "coverage"):
        if word in text:
            return word
    return "full" if name in FULL_POWER else "coverage" if name in COVERAGE else None


# Shots handled at once: some 20 MB with every column, whatever the granule's size.
BLOCK_SHOTS = 131_072
# A beam of a quarter orbit has some 300,000 shots; far more than that is a damaged or hostile header.
MAX_SHOTS = 50_000_000
# Rows of an unchunked table that are read together when any of them is wanted.
_PLAIN_ROWS = 4_096
# Rows of heights unpacked at once, unless a single chunk is taller.
_PIECE_ROWS = 16_384


def require_gedi() -> None:
    """Raises MissingDependencyError where HDF5 cannot be read or Parquet not be written."""
    try:
        import h5py
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"GEDI files need {(error.name or 'h5py').split('.')[0]}",
            remedy="run: pip install 'canopy-height[gedi]'",
        ) from error
    del h5py, pyarrow


@dataclass(frozen=True)
class Beam:
    """One beam of an open granule."""

    path: Path
    name: str
    group: h5py.Group
    count: int
    # Kept open so that HDF5 remembers the chunk that two blocks share.
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def description(self) -> str | None:
        """The group's own words: "Full power beam" or "Coverage beam"."""
        return text_of(self.group.attrs.get("description"))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, end) shot indexes that cover the beam."""
        for first in range(0, self.count, BLOCK_SHOTS):
            yield first, min(first + BLOCK_SHOTS, self.count)

    def find(self, variable: Variable) -> h5py.Dataset | None:
        """The dataset of a variable under the first of its names that is there.

        Raises DataError when it has not one value per shot.
        """
        if variable.column not in self._open:
            name, dataset = _first(self.group, variable.paths)
            if dataset is not None and dataset.shape != (self.count,):
                raise DataError(
                    f"{name} has shape {dataset.shape}", where=self._where, expected=f"({self.count},)"
                )
            self._open[variable.column] = dataset
        return self._open[variable.column]

    def read(self, variable: Variable, first: int, end: int) -> np.ndarray | None:
        """Values of shots first..end; None where the granule has no such variable.

        uint64 for the shot number; whole numbers as int16 with -1 for missing; others float64 with NaN.
        Raises DataError for a needed variable that is not there, a wrong type, or damage.
        """
        dataset = self.find(variable)
        if dataset is None:
            if variable.needed:
                raise self.missing([variable])
            return None
        with self._damage(dataset.name):
            values = dataset[first:end]
        if variable.kind == "shot":
            if values.dtype.kind not in "iu":
                raise DataError(
                    f"{dataset.name} is stored as {values.dtype}",
                    where=self.path,
                    expected="whole numbers: a shot number loses its last digits as a float",
                )
            return values.astype(np.uint64)
        if variable.kind == "flag":
            # 255 is the fill value of GEDI's bytes.
            known = np.isfinite(values) & (values >= 0) & (values < 255)
            return np.where(known, values, -1).astype(np.int16)
        numbers = values.astype(np.float64)
        numbers[~(numbers > FILL_BELOW)] = np.nan
        return numbers

    def heights(self) -> h5py.Dataset:
        """The dataset of relative heights, (shots, 101) metres. Raises DataError."""
        _, dataset = _first(self.group, (RH_PATH,))
        if dataset is None:
            raise DataError(f"no variable {RH_PATH}", where=self._where, expected="a GEDI L2A granule")
        if dataset.shape != (self.count, RH_COUNT):
            raise DataError(
                f"rh has shape {dataset.shape}", where=self._where, expected=f"({self.count}, {RH_COUNT})"
            )
        if dataset.dtype.kind != "f":
            raise DataError(
                f"rh is stored as {dataset.dtype}", where=self._where, expected="metres as floats"
            )
        return dataset

    def read_heights(self, rows: np.ndarray, columns: Sequence[int]) -> np.ndarray:
        """Relative heights of some shots, float32 (len(rows), len(columns)), NaN where missing.

        `rows` ascend. HDF5 unpacks whole chunks, so the chunks that hold a wanted row are read once, each
        group of columns that shares chunks together; chunks without a wanted row or column are left alone.
        """
        dataset = self.heights()
        tall, wide = dataset.chunks or (_PLAIN_ROWS, RH_COUNT)
        out = np.empty((len(rows), len(columns)), np.float32)
        with self._damage(dataset.name):
            for begin, stop in _runs(rows // tall, max(1, _PIECE_ROWS // tall)):
                first, last = int(rows[begin]), int(rows[stop - 1]) + 1
                for together in _by_chunk(columns, wide):
                    low, high = min(columns[i] for i in together), max(columns[i] for i in together)
                    piece = dataset[first:last, low : high + 1]
                    for i in together:
                        out[begin:stop, i] = piece[rows[begin:stop] - first, columns[i] - low]
        out[~(out > FILL_BELOW)] = np.nan
        return out

    def missing(self, variables: Sequence[Variable], remedy: str | None = None) -> DataError:
        """The error for variables that are not there, with every name that was looked for."""
        looked = "; ".join(f"{v.column} (looked for {', '.join(v.paths)})" for v in variables)
        return DataError(f"no {looked}", where=self._where, remedy=remedy)

    @property
    def _where(self) -> str:
        return f"{self.path}, {self.name}"

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Turn what HDF5 says of damaged chunks into one line."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{name} cannot be read ({_reason(error)})", where=self.path, remedy="download the file again"
            ) from error


@contextlib.contextmanager
def open_granule(path: str | Path, product: str = "L2A") -> Iterator[h5py.File]:
    """An open GEDI file of a product ("L2A", "L2B", "L4A"), read only.

    Raises DataError for what is missing, no HDF5, truncated, or another product.
    """
    import h5py

    path = Path(check_name(path, DataError))
    if path.is_dir():
        raise DataError("a folder", where=path, expected="a GEDI .h5 file")
    if not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    if not h5py.is_hdf5(path) and zipfile.is_zipfile(path):
        raise DataError("a zip archive", where=path, expected="a GEDI .h5 file", remedy="unpack it first")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        named = text_of(file.attrs.get("short_name"))
        level = re.search(r"GEDI.*?([1-4])_?([A-D])(?![A-Z0-9])", (named or "").upper())
        if level and f"L{level[1]}{level[2]}" != product:
            raise DataError(f"the product {named}", where=path, expected=f"GEDI {product}")
        try:
            yield file
        except (OSError, RuntimeError) as error:
            if isinstance(error, CanopyError):
                raise
            raise DataError(
                f"damaged ({_reason(error)})", where=path, remedy="download the file again"
            ) from error


def beams_of(file: h5py.File, path: Path) -> list[Beam]:
    """The beams that hold shots, by name. Raises DataError for a file without any beam group."""
    names = [name for name in sorted(file) if BEAM_NAME.match(name)]
    if not names:
        found = ", ".join(sorted(file)[:5]) or "nothing"
        raise DataError(f"no beams; it holds {found}", where=path, expected="groups BEAM0000 to BEAM1011")
    beams = []
    for name in names:
        group = file.get(name)
        _, numbers = _first(group, SHOT_NUMBER.paths) if hasattr(group, "keys") else ("", None)
        # Subsets keep the groups of beams that never crossed their area, with or without empty tables.
        if group is None or (numbers is None and RH_PATH not in group):
            continue
        if numbers is None:
            raise Beam(path, name, group, 0).missing([SHOT_NUMBER])
        if numbers.ndim != 1 or len(numbers) > MAX_SHOTS:
            raise DataError(
                f"shot_number has shape {numbers.shape}",
                where=f"{path}, {name}",
                expected=f"at most {MAX_SHOTS} shots",
            )
        if len(numbers):
            beams.append(Beam(path, name, group, len(numbers)))
    return beams


def text_of(value: Any) -> str | None:
    """An HDF5 attribute as text, whichever way it was stored."""
    while isinstance(value, np.ndarray | list | tuple):
        if len(np.atleast_1d(value)) == 0:
            return None
        value = np.atleast_1d(value)[0]
    return (
        value.decode("utf-8", "replace")
        if isinstance(value, bytes)
        else None
        if value is None
        else str(value)
    )


def _first(group: Any, names: Sequence[str]) -> tuple[str, h5py.Dataset | None]:
    for name in names:
        found = group.get(name)
        if found is not None and hasattr(found, "dtype"):
            return name, found
    return "", None


def _runs(chunks: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """(begin, stop) of stretches of neighbouring chunks, at most about `most` of them at a time."""
    if len(chunks) == 0:
        return
    cuts = np.flatnonzero((np.diff(chunks) > 1) | (np.diff(chunks // most) > 0)) + 1
    yield from itertools.pairwise([0, *cuts.tolist(), len(chunks)])


def _by_chunk(columns: Sequence[int], wide: int) -> list[list[int]]:
    """Positions of the columns, those of one HDF5 chunk column together."""
    groups: dict[int, list[int]] = {}
    for position, column in enumerate(columns):
        groups.setdefault(column // wide, []).append(position)
    return list(groups.values())


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _unreadable(path: Path, error: OSError) -> DataError:
    text = str(error)
    if "truncated" in text:
        return DataError("truncated", where=path, expected="a whole file", remedy="download it again")
    if "signature not found" in text:
        return DataError("not an HDF5 file", where=path, expected="a GEDI .h5 file")
    return DataError(f"cannot be opened ({_reason(error)})", where=path, expected="a GEDI .h5 file")


class Companion:
    """The granules of one product ("L2B" or "L4A"), looked up by beam and shot number.

    Opening reads every shot number once, to know which granule holds which; of the beams themselves one is
    held at a time. Raises DataError for a file that is not of the product or lacks its first variable.
    """

    def __init__(self, product: str, paths: Sequence[str | Path]) -> None:
        self.product, self.variables = product, COMPANIONS[product]
        self.matched = 0
        self._index: list[tuple[Path, str, int, int]] = []
        self._held: tuple[tuple[Path, str], dict[str, np.ndarray]] | None = None
        for path in map(Path, paths):
            with open_granule(path, product) as file:
                for beam in beams_of(file, path):
                    if beam.find(self.variables[0]) is None:
                        raise beam.missing(self.variables[:1])
                    numbers = _numbers(beam)
                    self._index.append((path, beam.name, int(numbers.min()), int(numbers.max())))

    def lookup(self, beam_name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Columns (n,) for a beam's shots by uint64 shot number (n,); NaN or -1 where there is none."""
        found = np.zeros(len(numbers), bool)
        out = {
            v.column: np.full(len(numbers), -1, np.int16)
            if v.kind == "flag"
            else np.full(len(numbers), np.nan)
            for v in self.variables
        }
        if not len(numbers):
            return out
        lowest, highest = int(numbers.min()), int(numbers.max())
        for path, name, low, high in self._index:
            if name != beam_name or low > highest or high < lowest:
                continue
            held = self._load(path, name)
            at = np.searchsorted(held["shot_number"], numbers)
            at = np.minimum(at, len(held["shot_number"]) - 1)
            here = (held["shot_number"][at] == numbers) & ~found
            for variable in self.variables:
                out[variable.column][here] = held[variable.column][at[here]]
            found |= here
        self.matched += int(found.sum())
        return out

    def _load(self, path: Path, name: str) -> dict[str, np.ndarray]:
        """A beam's columns, sorted by shot number; the last one is kept."""
        if self._held is not None and self._held[0] == (path, name):
            return self._held[1]
        with open_granule(path, self.product) as file:
            beam = next(beam for beam in beams_of(file, path) if beam.name == name)
            numbers = _numbers(beam)
            order = np.argsort(numbers, kind="stable")
            columns = {"shot_number": numbers[order]}
            for variable in self.variables:
                values = beam.read(variable, 0, beam.count)
                if values is None:
                    values = np.full(len(numbers), -1.0 if variable.kind == "flag" else np.nan)
                columns[variable.column] = values[order]
        self._held = (path, name), columns
        return columns


def _numbers(beam: Beam) -> np.ndarray:
    numbers = beam.read(SHOT_NUMBER, 0, beam.count)
    assert numbers is not None  # a beam without shot numbers is not a beam
    return numbers


@dataclass(frozen=True)
class Granule:
    """What a Level 2A file holds: version 2 or 3 by its variables, shots per beam, columns it cannot fill."""

    path: Path
    version: int
    beams: dict[str, int]
    absent: tuple[str, ...]

    @property
    def shots(self) -> int:
        return sum(self.beams.values())


@dataclass
class Tally:
    """Where the shots went. Every shot read is in exactly one of the other counts."""

    read: int = 0
    no_position: int = 0
    outside: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    duplicate: int = 0
    kept: int = 0
    # (west, south, east, north) of all shots with a place, degrees.
    extent: tuple[float, float, float, float] | None = None

    def reject(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            self.rejected[name] = self.rejected.get(name, 0) + count

    def stretch(self, lon: np.ndarray, lat: np.ndarray) -> None:
        if len(lon):
            w, s, e, n = self.extent or (180.0, 90.0, -180.0, -90.0)
            self.extent = (min(w, lon.min()), min(s, lat.min()), max(e, lon.max()), max(n, lat.max()))

    def __str__(self) -> str:
        why = ", ".join(f"{name} {count}" for name, count in self.rejected.items() if count)
        parts = [f"{self.outside} outside the area", f"{sum(self.rejected.values())} rejected"]
        parts[1] += f" ({why})" if why else ""
        parts += [f"{self.no_position} without a place"] if self.no_position else []
        parts += [f"{self.duplicate} read before"] if self.duplicate else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "no_position": self.no_position,
            "outside": self.outside,
            "rejected": self.rejected,
            "duplicate": self.duplicate,
            "kept": self.kept,
        }


@dataclass(frozen=True)
class ShotsReport:
    """What `extract_shots` did."""

    out: Path
    granules: tuple[Granule, ...]
    filter: str
    rh: tuple[int, ...]
    tally: Tally
    matched: dict[str, int]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        granules = [
            {"file": str(g.path), "version": g.version, "shots": g.shots, "beams": g.beams}
            for g in self.granules
        ]
        return {
            "out": str(self.out),
            "filter": self.filter,
            "rh": list(self.rh),
            "shots": self.tally.to_dict(),
            "matched": self.matched,
            "granules": granules,
            "notes": list(self.notes),
        }


def nothing_left(tally: Tally, area: AOI | None, filter: str) -> InputError:
    """The error for a run that keeps no shot."""
    what = f"none of {tally.read} shots is left: {tally}"
    if area is None or tally.extent is None or tally.outside + tally.no_position < tally.read:
        remedy = None if filter == "none" else "use --filter loose or none to see what there is"
        return DataError(what, remedy=remedy)
    west, south, east, north = tally.extent
    remedy = f"the shots lie at latitude {south:.2f} to {north:.2f}, longitude {west:.2f} to {east:.2f}"
    w, s, e, n = area.lonlat.bounds
    if s <= east and n >= west and w <= north and e >= south:
        remedy += "; with latitude and longitude swapped the area would meet them: check the order"
    return AreaError(what, where=area.describe(), remedy=remedy)


def notes_on(granules: Sequence[Granule], matched: dict[str, int], tally: Tally) -> Iterator[str]:
    """What the user should know about a run that went well."""
    paths = {v.column: v.paths for v in (*L2A, TIME)}
    for absent in dict.fromkeys(g.absent for g in granules if g.absent):
        lacking = [g for g in granules if g.absent == absent]
        names = lacking[0].path.name if len(lacking) == 1 else f"{len(lacking)} granules"
        looked = "; ".join(f"{column} (looked for {', '.join(paths[column])})" for column in absent)
        yield f"{names}: no {looked}; left empty there"
    for granule in granules:
        if not granule.shots:
            yield f"{granule.path.name}: holds no shots"
    for product, count in matched.items():
        if count < tally.kept:
            yield f"{product}: values for {count} of {tally.kept} shots"


SUFFIXES = (".parquet", ".geoparquet")
# Rows per row group: large enough to compress, small enough to hold.
GROUP_ROWS = 131_072


def rh_column(percent: int) -> str:
    """Name of the column of a relative height: rh_95, rh_98."""
    return f"rh_{percent}"


def shot_schema(rh: Sequence[int], extras: Sequence[Variable], facts: Mapping[str, object]) -> pa.Schema:
    """Columns and metadata of the output, in order; `extras` come from Levels 2B and 4A."""
    import pyarrow as pa

    require_gedi()
    types: dict[str, Any] = {"shot_number": pa.uint64(), "beam": pa.string(), "beam_type": pa.string()}
    types |= {"lat": pa.float64(), "lon": pa.float64()}
    types |= {rh_column(percent): pa.float32() for percent in rh}
    types |= {variable.column: getattr(pa, variable.dtype)() for variable in L2A}
    types |= {"time": pa.timestamp("us", tz="UTC"), "granule": pa.string(), "weight": pa.float32()}
    types |= {variable.column: getattr(pa, variable.dtype)() for variable in extras}
    types["geometry"] = pa.binary()
    column = {"encoding": "WKB", "geometry_types": ["Point"], "crs": _wgs84()}
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": column}}
    metadata = {"geo": json.dumps(geo), "canopy": json.dumps(facts, sort_keys=True)}
    return pa.schema(list(types.items()), metadata=metadata)


def as_table(schema: pa.Schema, columns: Mapping[str, np.ndarray | str | None], count: int) -> pa.Table:
    """Arrays (count,) -> an Arrow table of the schema.

    NaN, and -1 in columns of flags, become nulls; a single text is repeated; None is a column of nulls.
    `time` comes as seconds since 2018-01-01, the geometry is made here of `lon` and `lat`.
    """
    import pyarrow as pa

    arrays = []
    for column in schema:
        values = columns.get(column.name)
        if column.name == "geometry":
            arrays.append(_points(np.asarray(columns["lon"]), np.asarray(columns["lat"])))
        elif values is None:
            arrays.append(pa.nulls(count, column.type))
        elif isinstance(values, str):
            arrays.append(pa.repeat(pa.scalar(values, column.type), count))
        elif column.name == "time":
            known = np.isfinite(values)
            micros = np.rint((np.where(known, values, 0) + EPOCH_UNIX_S) * 1e6).astype(np.int64)
            arrays.append(pa.array(micros, pa.int64(), mask=~known).cast(column.type))
        elif pa.types.is_uint8(column.type):
            arrays.append(pa.array(np.maximum(values, 0).astype(np.uint8), column.type, mask=values < 0))
        elif pa.types.is_floating(column.type):
            arrays.append(
                pa.array(values.astype(column.type.to_pandas_dtype()), column.type, from_pandas=True)
            )
        else:
            arrays.append(pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


class ShotWriter:
    """Write tables of shots one after the other; a context manager.

    The rows go to a hidden file beside `path`. On a clean exit it is closed, read back row group by row
    group, compared with what was written, flushed and renamed; on an exception, or when nothing was added,
    it is removed and `path` is as before. Memory holds one row group.

    Raises InputError for a name that is not .parquet, an existing file without `overwrite`, or no such
    folder; OutputError for a disk that does not take it.
    """

    def __init__(self, path: str | Path, schema: pa.Schema, *, overwrite: bool = False) -> None:
        self.path, self.schema, self.rows = check_out(path, overwrite), schema, 0
        self._waiting: list[pa.Table] = []
        self._held = 0
        self._sums: list[tuple[int, ...]] = []
        self._writer: Any = None
        self._temporary: Path | None = None

    def add(self, table: pa.Table) -> None:
        """Append a table of the schema."""
        self._waiting.append(table)
        self._held += len(table)
        self.rows += len(table)
        if self._held >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._held = [], 0
        try:
            if self._writer is None:
                handle, name = tempfile.mkstemp(
                    prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent
                )
                os.close(handle)
                self._temporary = Path(name)
                self._writer = pq.ParquetWriter(name, self.schema, compression="zstd")
            for first in range(0, len(whole), GROUP_ROWS):
                piece = whole.slice(first, GROUP_ROWS)
                self._writer.write_table(piece, row_group_size=GROUP_ROWS)
                self._sums.append(_sums(piece))
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Verify the file and move it into place; does nothing when no row was added."""
        try:
            if self._held:
                self._flush()
            if self._writer is None or self._temporary is None:
                return
            self._writer.close()
            self._verify(self._temporary)
            with self._temporary.open("rb+") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            # The temporary file was made private; the result gets the permissions of any new file.
            mask = os.umask(0)
            os.umask(mask)
            self._temporary.chmod(0o666 & ~mask)
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise error if isinstance(error, OutputError) else self._failure(error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was written and not yet finished."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        self._writer = self._temporary = None

    def _verify(self, path: Path) -> None:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as made:
            same = made.num_row_groups == len(self._sums) and made.schema_arrow.equals(self.schema)
            if not same or any(
                _sums(made.read_row_group(index)) != sums for index, sums in enumerate(self._sums)
            ):
                raise OutputError(
                    "read back differently from what was written",
                    where=self.path,
                    remedy="nothing was kept; check the disk and run again",
                )

    def _failure(self, error: OSError) -> OutputError:
        reason = " ".join(str(error.strerror or error).split())[:160]
        return OutputError(f"cannot be written ({reason})", where=self.path)

    def __enter__(self) -> ShotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def check_out(path: str | Path, overwrite: bool) -> Path:
    """A path that may be written to; InputError or OutputError otherwise."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"the ending {path.suffix!r}", where=path, expected=" or ".join(SUFFIXES))
    if path.is_dir():
        raise InputError("a folder", where=path, expected="the name of a .parquet file")
    if path.exists() and not overwrite:
        raise InputError("the file exists", where=path, remedy="use --overwrite to replace it")
    if not path.parent.is_dir():
        raise InputError("no such folder", where=path.parent, remedy="create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError("the folder cannot be written to", where=path.parent)
    return path


def _wgs84() -> Any:
    """EPSG:4326 as PROJJSON; GeoParquet has longitude first whatever the CRS's own axis order."""
    import pyproj

    return pyproj.CRS("EPSG:4326").to_json_dict()


def _points(lon: np.ndarray, lat: np.ndarray) -> pa.Array:
    """WKB points, little endian, 21 bytes each."""
    import pyarrow as pa

    made = np.zeros(len(lon), np.dtype([("order", "u1"), ("kind", "<u4"), ("x", "<f8"), ("y", "<f8")]))
    made["order"], made["kind"], made["x"], made["y"] = 1, 1, lon, lat
    offsets = np.arange(len(lon) + 1, dtype=np.int32) * made.itemsize
    return pa.Array.from_buffers(
        pa.binary(), len(lon), [None, pa.py_buffer(offsets), pa.py_buffer(made.tobytes())]
    )


def _sums(table: pa.Table) -> tuple[int, ...]:
    """One checksum per column, of values and gaps, the same however Arrow holds them."""
    import pyarrow as pa

    sums = []
    for column in table.columns:
        array = pa.concat_arrays(column.chunks)
        gaps = np.asarray(array.is_null())
        if pa.types.is_string(array.type) or pa.types.is_binary(array.type):
            _, starts, texts = array.buffers()
            bounds = np.frombuffer(starts, np.int32)[array.offset : array.offset + len(array) + 1]
            data = np.diff(bounds).tobytes() + memoryview(texts)[bounds[0] : bounds[-1]].tobytes()
        else:
            kind = pa.int64() if pa.types.is_timestamp(array.type) else array.type
            data = array.cast(kind).fill_null(0).to_numpy(zero_copy_only=False).tobytes()
        sums.append(zlib.crc32(data, zlib.crc32(np.packbits(gaps).tobytes())))
    return tuple(sums)


DEFAULT_RH = (95, 98)


def extract_shots(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    area: AOI | None = None,
    rh: Sequence[int] = DEFAULT_RH,
    filter: str = "strict",
    l2b: Sequence[str | Path] = (),
    l4a: Sequence[str | Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ShotsReport:
    """Write the good shots of GEDI L2A granules to a GeoParquet file.

    Columns: shot_number (uint64), beam, beam_type (full or coverage), lat, lon (degrees, of the lowest mode),
    rh_NN (metres above the ground), sensitivity, sensitivity_a2, quality_flag, degrade_flag, solar_elevation
    (degrees), elev_lowestmode and dem (metres above the ellipsoid), landsat_water_persistence and
    urban_proportion (percent), time (UTC), granule, weight (0..1, see `shot_weights`); with `l2b` cover, pai
    and l2b_quality_flag, with `l4a` agbd (Mg/ha) and l4_quality_flag; geometry (points, EPSG:4326). Missing
    values are null. A shot found in two granules is kept once. Memory does not depend on the granules, and on
    the number of shots kept only through 8 bytes for each.

    Args:
        files: L2A granules, HDF5, version 2 or 3.
        out: the .parquet file; written whole or not at all.
        area: keep the shots in it, edges included; by default all.
        rh: which relative heights, percents of the returned energy.
        filter: "strict", "loose" or "none", see `canopy.labels.gedi`.
        l2b, l4a: granules whose values are joined by shot number.

    Raises:
        AreaError: no shot of the files lies in the area; nothing was written.
        DataError: a file that is not what it should be, or no shot passed the filter.
        InputError: an impossible option. MissingDependencyError: h5py or pyarrow is not installed.
        OutputError: the disk does not take the file.
    """
    require_gedi()
    check_out(out, overwrite)
    percents, criteria = check_rh(rh), filter_named(filter)
    granules = survey(files, filter)
    companions = [Companion(name, paths) for name, paths in (("L2B", l2b), ("L4A", l4a)) if paths]
    job = _Job(percents, filter, criteria, None if area is None else area.lonlat, companions)
    facts = {
        "version": __version__,
        "filter": filter,
        "rh": list(percents),
        "granules": [g.path.name for g in granules],
    }
    schema = shot_schema(percents, [v for c in companions for v in COMPANIONS[c.product]], facts)
    progress = progress or NoProgress()
    progress.start(sum(-(-n // BLOCK_SHOTS) for g in granules for n in g.beams.values()), "GEDI shots")
    with ShotWriter(out, schema, overwrite=overwrite) as writer:
        for granule in granules:
            with open_granule(granule.path) as file:
                for beam in beams_of(file, granule.path):
                    for table in job.tables(beam, schema, progress):
                        writer.add(table)
        if job.tally.kept == 0:
            raise nothing_left(job.tally, area, filter)
    matched = {c.product: c.matched for c in companions}
    notes = tuple(notes_on(granules, matched, job.tally))
    return ShotsReport(Path(out), tuple(granules), filter, percents, job.tally, matched, notes)


def survey(files: Sequence[str | Path], filter: str = "strict") -> list[Granule]:
    """Open every granule once and check that it can be used with the filter. Raises DataError."""
    require_gedi()
    paths = [Path(name) for name in files]
    for index, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:index]}:
            raise DataError("given twice", where=path, expected="every granule once")
    return [_survey_one(path, filter) for path in paths]


def check_rh(rh: Sequence[int]) -> tuple[int, ...]:
    """Percents without repeats; InputError when there is none, or one outside 0..100."""
    percents = tuple(dict.fromkeys(int(p) for p in rh))
    if not percents or not all(0 <= p <= 100 for p in percents):
        raise InputError(
            f"relative heights {', '.join(map(str, rh)) or 'none'}",
            where="--rh",
            expected="0 to 100, e.g. 95,98",
        )
    return percents


# --- reading ------------------------------------------------------------------------------------------


def _survey_one(path: Path, filter: str) -> Granule:
    needs = {name for criterion in filter_named(filter) for name in criterion.needs}
    absent: set[str] = set()
    counts: dict[str, int] = {}
    version = 2
    with open_granule(path) as file:
        for beam in beams_of(file, path):
            beam.heights()
            lacking = [v for v in (LAT, LON) if beam.find(v) is None]
            if lacking:
                raise beam.missing(lacking)
            here = {v.column for v in (*L2A, TIME) if beam.find(v) is None}
            if here & needs:
                able = [n for n, rules in FILTERS.items() if not here & {c for r in rules for c in r.needs}]
                raise beam.missing(
                    [v for v in L2A if v.column in here & needs], remedy=f"use --filter {' or '.join(able)}"
                )
            absent |= here
            counts[beam.name] = beam.count
            version = 3 if QUALITY_V3 in beam.group else version
    return Granule(path, version, counts, tuple(v.column for v in (*L2A, TIME) if v.column in absent))


@dataclass
class _Job:
    """What is wanted of every beam, and what came of it so far."""

    rh: tuple[int, ...]
    filter: str
    criteria: tuple[Criterion, ...]
    area: Any
    companions: list[Companion]
    tally: Tally = field(default_factory=Tally)
    # Shot numbers kept so far, sorted, by beam.
    _seen: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.area is not None:
            shapely.prepare(self.area)

    def tables(self, beam: Beam, schema: pa.Schema, progress: Progress) -> Iterator[pa.Table]:
        """The wanted shots of a beam, block by block."""
        for first, end in beam.blocks():
            columns, rows = self._shots(beam, first, end)
            if len(rows):
                columns |= self._heights_and_rest(beam, rows, columns)
                good = ~np.isnan(np.column_stack([columns[rh_column(p)] for p in self.rh])).any(axis=1)
                if self.filter != "none" and not good.all():
                    self.tally.reject({"no_height": int((~good).sum())})
                    columns = {k: v[good] if isinstance(v, np.ndarray) else v for k, v in columns.items()}
                count = len(columns["lon"])
                self.tally.kept += count
                if count:
                    yield as_table(schema, columns, count)
            progress.advance()

    def _shots(self, beam: Beam, first: int, end: int) -> tuple[dict[str, Any], np.ndarray]:
        """Columns without heights, and row numbers, of a block's shots in the area that pass the filter."""
        lon, lat = beam.read(LON, first, end), beam.read(LAT, first, end)
        assert lon is not None and lat is not None  # needed variables
        placed = (np.abs(lon) <= 180) & (np.abs(lat) <= 90)
        self.tally.read += end - first
        self.tally.no_position += int((~placed).sum())
        self.tally.stretch(lon[placed], lat[placed])
        at = np.flatnonzero(placed)
        at = at[_inside(self.area, lon[at], lat[at])]
        self.tally.outside += int(placed.sum()) - len(at)
        if len(at) == 0:
            return {}, at
        low, high = first + int(at[0]), first + int(at[-1]) + 1
        columns: dict[str, Any] = {"lon": lon[at], "lat": lat[at]}
        pick = at + first - low
        for variable in (SHOT_NUMBER, *L2A):
            values = beam.read(variable, low, high)
            columns[variable.column] = None if values is None else values[pick]
        good, rejected = apply_filter(self.criteria, columns, len(at))
        self.tally.reject(rejected)
        new = self._unseen(beam.name, columns["shot_number"], good)
        columns = {name: None if values is None else values[new] for name, values in columns.items()}
        return columns, at[new] + first

    def _heights_and_rest(self, beam: Beam, rows: np.ndarray, columns: dict[str, Any]) -> dict[str, Any]:
        """Heights, time, names, weight and joined values of chosen shots."""
        heights = beam.read_heights(rows, self.rh)
        low = int(rows[0])
        seconds = beam.read(TIME, low, int(rows[-1]) + 1)
        kind = beam_type(beam.name, beam.description)
        sensitivity = columns["sensitivity"]
        rest: dict[str, Any] = {
            "time": None if seconds is None else seconds[rows - low],
            "beam": beam.name,
            "beam_type": kind,
            "granule": beam.path.stem,
            "weight": shot_weights(kind, np.full(len(rows), np.nan) if sensitivity is None else sensitivity),
        }
        rest |= {rh_column(percent): heights[:, i] for i, percent in enumerate(self.rh)}
        for companion in self.companions:
            rest |= companion.lookup(beam.name, columns["shot_number"])
        return rest

    def _unseen(self, beam_name: str, numbers: np.ndarray, good: np.ndarray) -> np.ndarray:
        """`good` without the shots that an earlier granule gave already."""
        new, seen = good.copy(), self._seen.setdefault(beam_name, [])
        for before in seen:
            if len(before) and numbers.min() <= before[-1] and numbers.max() >= before[0]:
                new &= ~np.isin(numbers, before)
        self.tally.duplicate += int(good.sum() - new.sum())
        seen.append(np.sort(numbers[new]))
        return new


def _inside(area: Any, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Bool (n,): points in or on the edge of a prepared geometry in degrees; all of them without one."""
    if area is None:
        return np.ones(len(lon), bool)
    west, south, east, north = area.bounds
    result = (lon >= west) & (lon <= east) & (lat >= south) & (lat <= north)
    near = np.flatnonzero(result)
    result[near] = shapely.intersects_xy(area, lon[near], lat[near])
    return result


def read_shots(path: str | Path, columns: Sequence[str] | None = None) -> geopandas.GeoDataFrame:
    """Shots of a GeoParquet, plain Parquet or CSV file as points in EPSG:4326.

    Needs `shot_number`, a place (`lat` and `lon`, their GEDI names, or a point geometry) and at least one
    relative height (`rh_95`, or `rh95`); GEDI's and our own spellings are accepted and ours returned. Shot
    numbers stay exact uint64. `columns` limits the others.

    Raises DataError for a file that is not such a table.
    """
    require_gedi()
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    table = _read_csv(path) if path.suffix.lower() in (".csv", ".txt") else _read_parquet(path)
    return _as_shots(table.rename(columns=_our_name), path, columns)


def _our_name(name: str) -> str:
    known = {v.paths[0].split("/")[-1]: v.column for v in (SHOT_NUMBER, LAT, LON, TIME, *L2A)}
    known |= {"latitude": "lat", "longitude": "lon", "elev_lowestmode_m": "elev_lowestmode"}
    height = re.fullmatch(r"rh_?(\d{1,3})(?:_m)?", name.lower())
    return rh_column(int(height[1])) if height else known.get(name, name)


def _read_csv(path: Path) -> pandas.DataFrame:
    import pandas

    try:
        # Through text: a column of whole numbers with a gap in it would be read as floats.
        return pandas.read_csv(path, dtype={"shot_number": str})
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"not a table of shots ({_short(error)})", where=path) from error


def _read_parquet(path: Path) -> pandas.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file ({_short(error)})", where=path, expected=".parquet or .csv of shots"
        ) from error
    if "geometry" in table.column_names and not {"lat", "lon"} <= {_our_name(n) for n in table.column_names}:
        import shapely

        points = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
        table = table.append_column("lon", pa.array(shapely.get_x(points)))
        table = table.append_column("lat", pa.array(shapely.get_y(points)))
    return table.drop_columns([n for n in table.column_names if n == "geometry"]).to_pandas()


def _as_shots(table: pandas.DataFrame, path: Path, columns: Sequence[str] | None) -> geopandas.GeoDataFrame:
    import geopandas

    heights = [name for name in table if re.fullmatch(r"rh_\d+", str(name))]
    missing = [name for name in ("shot_number", "lat", "lon") if name not in table]
    if missing or not heights:
        raise DataError(
            f"no column {', '.join([*missing, *([] if heights else ['rh_95'])])}",
            where=path,
            expected="a table of GEDI shots, as `canopy data gedi` writes",
        )
    table["shot_number"] = _exact(table["shot_number"], path)
    if "time" in table and table["time"].dtype.kind == "f":
        import pandas

        table["time"] = pandas.to_datetime(table["time"] + EPOCH_UNIX_S, unit="s", utc=True)
    if columns is not None:
        table = table[list(dict.fromkeys(["shot_number", "lat", "lon", *columns]))]
    points = geopandas.points_from_xy(table["lon"], table["lat"], crs="EPSG:4326")
    return geopandas.GeoDataFrame(table, geometry=points)


def _exact(numbers: pandas.Series, path: Path) -> np.ndarray:
    """Shot numbers as uint64; texts are read digit by digit, floats refused."""
    try:
        if numbers.dtype.kind == "f":
            raise ValueError("stored as floats, which lose the last digits")
        if numbers.dtype.kind in "iu":
            return numbers.to_numpy().astype(np.uint64)
        return np.array([int(text) for text in numbers], np.uint64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"shot_number: {_short(error)}", where=path, expected="whole numbers") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
