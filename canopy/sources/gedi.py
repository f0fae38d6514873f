"""GEDI Level 2A granules -> one table of the shots worth using (GeoParquet).

Per beam and block of shots: places first, then the area, then the flags, and only then the wanted relative
heights of the shots that are left. A shot is a disc of some 25 m whose place is known to some 10 m: compare
it with a statistic over the disc (`canopy.sources.gedi_footprint`), never with a pixel. Dubayah et al. 2020,
The Global Ecosystem Dynamics Investigation, Science of Remote Sensing 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from canopy import __version__
from canopy.errors import DataError, InputError
from canopy.geo.aoi import AOI
from canopy.runtime import NoProgress, Progress
from canopy.sources.gedi_filters import FILTERS, Criterion, apply_filter, filter_named, shot_weights
from canopy.sources.gedi_h5 import BLOCK_SHOTS, Beam, beams_of, open_granule, require_gedi
from canopy.sources.gedi_join import Companion
from canopy.sources.gedi_names import COMPANIONS, L2A, LAT, LON, QUALITY_V3, SHOT_NUMBER, TIME, beam_type
from canopy.sources.gedi_report import Granule, ShotsReport, Tally, notes_on, nothing_left
from canopy.sources.gedi_table import ShotWriter, as_table, check_out, rh_column, shot_schema

if TYPE_CHECKING:
    import pyarrow as pa

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
        filter: "strict", "loose" or "none", see `canopy.sources.gedi_filters`.
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
