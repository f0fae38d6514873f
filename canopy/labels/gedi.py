"""GEDI Level 2A granules to one table of the shots worth using, with values of Levels 2B and 4A joined to it.

A variable is looked for under several names, first match first, so that a granule's version is told by what
it holds and never by its file name. Version 3 renamed the quality flags (`l2a_quality_flag_rel3`; a plain
`quality_flag`, where one remains beside it, means less) and moved Level 2B's coordinates to the beam's root.
Data dictionaries: GEDI L2A and L2B product data dictionaries (LP DAAC), GEDI04_A user guide (ORNL DAAC).

Which shots are good enough is said by named filters:

strict: quality_flag = 1, degrade_flag = 0, sensitivity above 0.95 (0.98 within the tropics, where the canopy
    is denser), landsat_water_persistence below 10 %, urban_proportion below 50 %, and all that loose asks
    for. For training and scores. What a granule does not hold is not asked for, and said.
loose: sensitivity at least 0.5, that of algorithm setting 2 above 0.7, and the ground within 150 m of the
    digital elevation model. For maps of large areas, where numbers make up for noise.
none: every shot that has a place.

A missing value never passes. A rejected shot is counted once, under the first criterion that it fails. A shot
is a disc of some 25 m whose place is known to some 10 m: compare it with a statistic over the disc
(`canopy.labels.footprint`), never with a pixel. Dubayah et al. 2020, The Global Ecosystem Dynamics
Investigation, Science of Remote Sensing 1.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from canopy import __version__
from canopy.errors import AreaError, CanopyError, DataError, InputError
from canopy.files import check_name
from canopy.geo.area import AOI
from canopy.labels.shots import EPOCH_UNIX_S, check_shots_name, require_gedi, rh_column, write_shots
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import h5py
    import pandas

Columns = Mapping[str, np.ndarray]
# Half the width of the tropics, degrees.
TROPICS_LAT = 23.44
# Coverage beams carry half the energy of the full-power ones (Dubayah et al. 2020).
BEAM_WEIGHT = {"full": 1.0, "coverage": 0.5}
BEAM_NAME = re.compile(r"^BEAM[01]{4}$")
FULL_POWER = frozenset({"BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011"})
COVERAGE = frozenset({"BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011"})
# Fill values of GEDI's floats are -9999 and -999999, that of its bytes is 255.
FILL_BELOW = -9_998.5
RH_COUNT = 101
DEFAULT_RH = (95, 98)
# What tells a shot from all others.
KEY = ["beam", "shot_number"]
# A beam of a quarter orbit has some 300,000 shots; far more than that is a damaged or hostile header.
MAX_SHOTS = 50_000_000
# Rows of the 101 heights unpacked at once: 7 MB.
_PIECE_ROWS = 16_384


# --- variables and filters ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Variable:
    """One quantity per shot.

    Attributes:
        column: name of the output column.
        paths: names inside a beam's group, in the order they are looked for.
        kind: "number" (float, missing = NaN), "flag" (uint8, missing = null) or "shot" (uint64).
        dtype: NumPy type of the output column.
    """

    column: str
    paths: tuple[str, ...]
    kind: str = "number"
    dtype: str = "float32"


SHOT_NUMBER = Variable("shot_number", ("shot_number", "geolocation/shot_number"), "shot", "uint64")
LAT = Variable("lat", ("lat_lowestmode", "geolocation/lat_lowestmode"), dtype="float64")
LON = Variable("lon", ("lon_lowestmode", "geolocation/lon_lowestmode"), dtype="float64")
TIME = Variable("time", ("delta_time", "geolocation/delta_time"), dtype="float64")
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

# Level 2B: canopy cover (0..1) and plant area index (m2/m2). Level 4A: aboveground biomass density (Mg/ha).
COMPANIONS = {
    "L2B": (
        Variable("cover", ("cover",)),
        Variable("pai", ("pai",)),
        Variable("l2b_quality_flag", ("l2b_quality_flag_rel3", "l2b_quality_flag"), "flag", "uint8"),
    ),
    "L4A": (
        Variable("agbd", ("agbd",)),
        Variable("l4_quality_flag", ("l4a_quality_flag_rel3", "l4_quality_flag"), "flag", "uint8"),
    ),
}


@dataclass(frozen=True)
class Criterion:
    """A rule that a shot passes or not; `needs` are the columns it looks at."""

    name: str
    needs: tuple[str, ...]
    passes: Callable[[Columns], Any]


def _small(name: str, column: str, limit: int) -> Criterion:
    return Criterion(name, (column,), lambda shots: (shots[column] >= 0) & (shots[column] < limit))


def _enough_sensitivity(shots: Columns) -> Any:
    return shots["sensitivity"] > np.where(np.abs(shots["lat"]) < TROPICS_LAT, 0.98, 0.95)


_LOOSE = (
    Criterion("sensitivity", ("sensitivity",), lambda shots: shots["sensitivity"] >= 0.5),
    Criterion("sensitivity_a2", ("sensitivity_a2",), lambda shots: shots["sensitivity_a2"] > 0.7),
    Criterion(
        "elevation",
        ("elev_lowestmode", "dem"),
        lambda shots: np.abs(shots["elev_lowestmode"] - shots["dem"]) < 150.0,
    ),
)
_STRICT = (
    Criterion("quality_flag", ("quality_flag",), lambda shots: shots["quality_flag"] == 1),
    Criterion("degrade_flag", ("degrade_flag",), lambda shots: shots["degrade_flag"] == 0),
    Criterion("sensitivity", ("sensitivity",), _enough_sensitivity),
    _small("water", "landsat_water_persistence", 10),
    _small("urban", "urban_proportion", 50),
)
FILTERS: dict[str, tuple[Criterion, ...]] = {
    "strict": (*_STRICT, *_LOOSE[1:]),
    "loose": _LOOSE,
    "none": (),
}


def filter_named(name: str) -> tuple[Criterion, ...]:
    """The criteria of a filter. Raises InputError for an unknown name."""
    if name not in FILTERS:
        raise InputError(f"no filter {name!r}", where="--filter", expected=", ".join(FILTERS))
    return FILTERS[name]


def apply_filter(criteria: Sequence[Criterion], shots: Columns) -> tuple[np.ndarray, dict[str, int]]:
    """Which shots pass, bool (n,), and how many each criterion was the first to reject.

    Columns are float (n,), missing values NaN. Criteria whose columns are not there are passed over.
    """
    good, rejected = np.ones(len(shots["lat"]), bool), {}
    for criterion in criteria:
        if all(name in shots for name in criterion.needs):
            passed = good & np.asarray(criterion.passes(shots), bool)
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


# --- granules -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beam:
    """One beam of an open granule."""

    path: Path
    name: str
    group: h5py.Group
    count: int

    @property
    def where(self) -> str:
        return f"{self.path}, {self.name}"

    @property
    def type(self) -> str | None:
        """`full` or `coverage`: by the group's `description`, else by the known names; else None."""
        text = (_text(self.group.attrs.get("description")) or "").lower()
        told = next((word for word in ("full", "coverage") if word in text), None)
        return told or ("full" if self.name in FULL_POWER else "coverage" if self.name in COVERAGE else None)

    def find(self, variable: Variable) -> h5py.Dataset | None:
        """The dataset of a variable under the first of its names that is there, one value per shot."""
        name, dataset = _first(self.group, variable.paths)
        if dataset is not None and dataset.shape != (self.count,):
            raise DataError(
                f"{name} has shape {dataset.shape}", where=self.where, expected=f"({self.count},)"
            )
        return dataset

    def read(self, variable: Variable, rows: np.ndarray) -> np.ndarray | None:
        """Values of the shots `rows` (ascending); None where the granule has no such variable.

        uint64 for the shot number, else float64 with NaN for missing. Raises DataError for a wrong type or
        damage.
        """
        dataset = self.find(variable)
        if dataset is None:
            return None
        if variable.kind == "shot" and dataset.dtype.kind not in "iu":
            raise DataError(
                f"{dataset.name} is stored as {dataset.dtype}",
                where=self.path,
                expected="whole numbers: a shot number loses its last digits as a float",
            )
        if not len(rows):
            values = np.empty(0, dataset.dtype)
        else:
            with _damage(self.path, dataset.name):
                values = dataset[int(rows[0]) : int(rows[-1]) + 1][rows - rows[0]]
        if variable.kind == "shot":
            return values.astype(np.uint64)
        numbers = values.astype(np.float64)
        missing = (numbers < 0) | (numbers >= 255) if variable.kind == "flag" else numbers <= FILL_BELOW
        return np.where(missing, np.nan, numbers)

    def heights(self) -> h5py.Dataset:
        """The dataset of relative heights, (shots, 101) metres. Raises DataError."""
        _, dataset = _first(self.group, ("rh",))
        if dataset is None:
            raise DataError("no variable rh", where=self.where, expected="a GEDI L2A granule")
        if dataset.shape != (self.count, RH_COUNT):
            raise DataError(
                f"rh has shape {dataset.shape}", where=self.where, expected=f"({self.count}, {RH_COUNT})"
            )
        if dataset.dtype.kind != "f":
            raise DataError(f"rh is stored as {dataset.dtype}", where=self.where, expected="metres as floats")
        return dataset

    def read_heights(self, rows: np.ndarray, columns: Sequence[int]) -> np.ndarray:
        """Relative heights of `rows` (ascending), float32 (len(rows), len(columns)), NaN for missing."""
        dataset, pieces = self.heights(), [np.empty((0, len(columns)), np.float32)]
        with _damage(self.path, dataset.name):
            for start in range(0, self.count, _PIECE_ROWS):
                wanted = rows[(rows >= start) & (rows < start + _PIECE_ROWS)]
                if len(wanted):
                    piece = dataset[int(wanted[0]) : int(wanted[-1]) + 1]
                    pieces.append(piece[wanted - wanted[0]][:, list(columns)])
        values = np.concatenate(pieces).astype(np.float32)
        return np.where(values > FILL_BELOW, values, np.nan)

    def missing(self, variables: Sequence[Variable], remedy: str | None = None) -> DataError:
        """The error for variables that are not there, with every name that was looked for."""
        return DataError(f"no {_looked_for(variables)}", where=self.where, remedy=remedy)


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
    with file, _damage(path, "damaged"):
        named = _text(file.attrs.get("short_name"))
        level = re.search(r"GEDI.*?([1-4])_?([A-D])(?![A-Z0-9])", (named or "").upper())
        if level and f"L{level[1]}{level[2]}" != product:
            raise DataError(f"the product {named}", where=path, expected=f"GEDI {product}")
        yield file


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
        if group is None or (numbers is None and "rh" not in group):
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


def _text(value: Any) -> str | None:
    """An HDF5 attribute as text, whichever way it was stored."""
    flat = np.atleast_1d(np.asarray(value, dtype=object)).ravel()
    if value is None or not len(flat):
        return None
    return flat[0].decode("utf-8", "replace") if isinstance(flat[0], bytes) else str(flat[0])


def _first(group: Any, names: Sequence[str]) -> tuple[str, h5py.Dataset | None]:
    for name in names:
        found = group.get(name)
        if found is not None and hasattr(found, "dtype"):
            return name, found
    return "", None


@contextlib.contextmanager
def _damage(path: Path, name: str) -> Iterator[None]:
    """What HDF5 says of damaged chunks, as one line."""
    try:
        yield
    except CanopyError:
        raise
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{name} cannot be read ({reason})", where=path, remedy="download the file again"
        ) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    text = str(error)
    if "truncated" in text:
        return DataError("truncated", where=path, expected="a whole file", remedy="download it again")
    if "signature not found" in text:
        return DataError("not an HDF5 file", where=path, expected="a GEDI .h5 file")
    return DataError(
        f"cannot be opened ({' '.join(text.split())[:160]})", where=path, expected="a GEDI .h5 file"
    )


def _looked_for(variables: Sequence[Variable]) -> str:
    return "; ".join(f"{v.column} (looked for {', '.join(v.paths)})" for v in variables)


# --- extraction ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Granule:
    """What a Level 2A file holds: version 2 or 3 by its variables, shots per beam, columns it cannot fill.

    `unjudged` are the criteria of the filter that it cannot be held to.
    """

    path: Path
    version: int
    beams: dict[str, int]
    absent: tuple[Variable, ...]
    unjudged: tuple[str, ...]

    @property
    def shots(self) -> int:
        return sum(self.beams.values())


@dataclass
class Tally:
    """Where the shots went. Every shot read is in exactly one of the other counts.

    `extent` is (west, south, east, north) of all shots with a place, degrees.
    """

    read: int = 0
    no_position: int = 0
    outside: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    duplicate: int = 0
    kept: int = 0
    extent: tuple[float, float, float, float] | None = None

    def reject(self, counts: Mapping[str, int]) -> None:
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
        """The counts, for `--json`."""
        return {
            name: getattr(self, name)
            for name in ("read", "no_position", "outside", "rejected", "duplicate", "kept")
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
        return {
            "out": str(self.out),
            "filter": self.filter,
            "rh": list(self.rh),
            "shots": self.tally.to_dict(),
            "matched": self.matched,
            "granules": [
                {"file": str(g.path), "version": g.version, "shots": g.shots, "beams": g.beams}
                for g in self.granules
            ],
            "notes": list(self.notes),
        }


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
    """Write the good shots of GEDI L2A granules to a GeoParquet (or GeoPackage) file.

    Columns: shot_number (uint64), beam, beam_type (full or coverage), lat, lon (degrees, of the lowest mode),
    rh_NN (metres above the ground), sensitivity, sensitivity_a2, quality_flag, degrade_flag, solar_elevation
    (degrees), elev_lowestmode and dem (metres above the ellipsoid), landsat_water_persistence and
    urban_proportion (percent), time (UTC), granule, weight (0..1, see `shot_weights`); with `l2b` cover, pai
    and l2b_quality_flag, with `l4a` agbd (Mg/ha) and l4_quality_flag; geometry (points, EPSG:4326). Missing
    values are null. A shot found in two granules is kept once. Memory holds one beam and the shots kept.

    Args:
        files: L2A granules, HDF5, version 2 or 3, not both.
        out: the .parquet or .gpkg file; written whole or not at all.
        area: keep the shots in it, edges included; by default all.
        rh: which relative heights, percents of the returned energy.
        filter: "strict", "loose" or "none", see the module's head.
        l2b, l4a: granules whose values are joined by shot number.

    Raises:
        AreaError: no shot of the files lies in the area; nothing was written.
        DataError: a file that is not what it should be, or no shot passed the filter.
        InputError: an impossible option. MissingDependencyError: h5py or pyarrow is not installed.
        OutputError: the disk does not take the file.
    """
    import pandas

    require_gedi()
    percents = check_rh(rh)
    out = check_shots_name(out, [*files, *l2b, *l4a], overwrite)
    granules = survey(files, filter)
    progress, tally = progress or NoProgress(), Tally()
    progress.start(sum(len(g.beams) for g in granules), "GEDI shots")
    lonlat = None if area is None else area.lonlat
    tables: list[pandas.DataFrame] = []
    for granule in granules:
        with open_granule(granule.path) as file:
            for beam in beams_of(file, granule.path):
                tables.append(_good_shots(beam, lonlat, percents, filter_named(filter), tally))
                progress.advance()
    shots = pandas.concat([t for t in tables if len(t)] or tables[:1] or [pandas.DataFrame()])
    if len(shots):
        once = shots.drop_duplicates(KEY)
        tally.duplicate, shots = len(shots) - len(once), once
    tally.kept = len(shots)
    if not tally.kept:
        raise nothing_left(tally, area, filter)
    matched = {}
    for product, paths in (("L2B", l2b), ("L4A", l4a)):
        if paths:
            shots, matched[product] = _join(shots, product, paths)
    facts = {
        "version": __version__,
        "filter": filter,
        "rh": list(percents),
        "granules": [g.path.name for g in granules],
    }
    write_shots(shots.reset_index(drop=True), out, facts)
    notes = tuple(notes_on(granules, matched, tally))
    return ShotsReport(out, tuple(granules), filter, percents, tally, matched, notes)


def survey(files: Sequence[str | Path], filter: str = "strict") -> list[Granule]:
    """Open every granule once and check that it can be used with the filter. Raises DataError."""
    require_gedi()
    paths = [Path(name) for name in files]
    for index, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:index]}:
            raise DataError("given twice", where=path, expected="every granule once")
    granules = [_survey_one(path, filter_named(filter)) for path in paths]
    versions = {granule.version: granule.path for granule in granules if granule.shots}
    if len(versions) > 1:
        raise DataError(
            f"a granule of version 3 beside {versions[2].name} of version 2",
            where=versions[3],
            expected="one version: their geolocation and flags differ",
            remedy="run `canopy data gedi` once for each version",
        )
    return granules


def _survey_one(path: Path, criteria: tuple[Criterion, ...]) -> Granule:
    absent: dict[Variable, None] = {}
    counts: dict[str, int] = {}
    version = 2
    with open_granule(path) as file:
        for beam in beams_of(file, path):
            beam.heights()
            if lacking := [v for v in (LAT, LON) if beam.find(v) is None]:
                raise beam.missing(lacking)
            absent |= dict.fromkeys(v for v in (*L2A, TIME) if beam.find(v) is None)
            lost = {v.column for v in absent}
            unjudged = tuple(c.name for c in criteria if lost & set(c.needs))
            if criteria and len(unjudged) == len(criteria):
                needed = {name for criterion in criteria for name in criterion.needs}
                raise beam.missing([v for v in L2A if v.column in needed], remedy="use --filter none")
            counts[beam.name] = beam.count
            version = 3 if QUALITY_V3 in beam.group else version
    lost = {v.column for v in absent}
    unjudged = tuple(c.name for c in criteria if lost & set(c.needs))
    return Granule(path, version, counts, tuple(v for v in (*L2A, TIME) if v in absent), unjudged)


def _good_shots(
    beam: Beam, area: Any, rh: tuple[int, ...], criteria: tuple[Criterion, ...], tally: Tally
) -> pandas.DataFrame:
    """The beam's shots in the area (degrees) that pass: places first, then flags, then the wanted heights."""
    import pandas

    everything = np.arange(beam.count)
    lon, lat = beam.read(LON, everything), beam.read(LAT, everything)
    assert lon is not None and lat is not None  # `survey` has seen them
    placed = (np.abs(lon) <= 180) & (np.abs(lat) <= 90)
    rows = np.flatnonzero(placed)
    if area is not None:
        shapely.prepare(area)
        rows = rows[shapely.intersects_xy(area, lon[rows], lat[rows])]
    tally.read += beam.count
    tally.no_position += int((~placed).sum())
    tally.outside += int(placed.sum()) - len(rows)
    tally.stretch(lon[placed], lat[placed])
    columns = {v.column: beam.read(v, rows) for v in (SHOT_NUMBER, *L2A)}
    known = {name: values for name, values in columns.items() if values is not None}
    good, rejected = apply_filter(criteria, known | {"lat": lat[rows]})
    heights = np.full((len(rows), len(rh)), np.nan, np.float32)
    heights[good] = beam.read_heights(rows[good], rh)
    if criteria:
        whole = good & ~np.isnan(heights).any(axis=1)
        rejected["no_height"] = int(good.sum() - whole.sum())
        good = whole
    tally.reject(rejected)
    seconds = beam.read(TIME, rows)
    table = pandas.DataFrame(
        {"shot_number": columns["shot_number"], "beam": beam.name, "beam_type": beam.type}
        | {"lat": lat[rows], "lon": lon[rows]}
        | {rh_column(percent): heights[:, i] for i, percent in enumerate(rh)}
        | {v.column: _as_column(columns[v.column], v, len(rows)) for v in L2A}
        | {"time": _instants(seconds, len(rows)), "granule": beam.path.stem}
    )
    sensitivity = table["sensitivity"].to_numpy(np.float64)
    return table.assign(weight=shot_weights(beam.type, sensitivity))[good]


def _as_column(values: np.ndarray | None, variable: Variable, count: int) -> Any:
    """Numbers with NaN as the column's type; flags become nullable bytes."""
    import pandas

    values = np.full(count, np.nan) if values is None else values
    if variable.kind == "flag":
        return pandas.array(values, dtype="Float64").astype("UInt8")
    return values.astype(variable.dtype)


def _instants(seconds: np.ndarray | None, count: int) -> Any:
    import pandas

    seconds = np.full(count, np.nan) if seconds is None else seconds
    known = np.isfinite(seconds)
    micros = np.rint((np.where(known, seconds, 0) + EPOCH_UNIX_S) * 1e6).astype("datetime64[us]")
    return pandas.Series(np.where(known, micros, np.datetime64("NaT", "us"))).dt.tz_localize("UTC")


def _join(shots: pandas.DataFrame, product: str, paths: Sequence[str | Path]) -> tuple[pandas.DataFrame, int]:
    """The shots with a product's columns, and for how many it has values.

    Raises DataError for a file that is not of the product or lacks its first variable.
    """
    import pandas

    variables, found = COMPANIONS[product], []
    for path in map(Path, paths):
        with open_granule(path, product) as file:
            for beam in beams_of(file, path):
                if beam.find(variables[0]) is None:
                    raise beam.missing(variables[:1])
                numbers = beam.read(SHOT_NUMBER, np.arange(beam.count))
                assert numbers is not None  # a beam without shot numbers is not a beam
                rows = np.flatnonzero(np.isin(numbers, shots["shot_number"].to_numpy()))
                columns = {v.column: _as_column(beam.read(v, rows), v, len(rows)) for v in variables}
                keys = {"beam": beam.name, "shot_number": numbers[rows]}
                found.append(pandas.DataFrame(keys | columns))
    values = pandas.concat(found).drop_duplicates(KEY)
    joined = shots.merge(values, how="left", on=KEY, indicator="found")
    return joined.drop(columns="found"), int((joined["found"] == "both").sum())


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
    for absent in dict.fromkeys(g.absent for g in granules if g.absent):
        lacking = [g for g in granules if g.absent == absent]
        names = lacking[0].path.name if len(lacking) == 1 else f"{len(lacking)} granules"
        yield f"{names}: no {_looked_for(absent)}; left empty there"
        if lacking[0].unjudged:
            yield f"{names}: the shots were not judged by {', '.join(lacking[0].unjudged)}"
    for granule in granules:
        if not granule.shots:
            yield f"{granule.path.name}: holds no shots"
    for product, count in matched.items():
        if count < tally.kept:
            yield f"{product}: values for {count} of {tally.kept} shots"
