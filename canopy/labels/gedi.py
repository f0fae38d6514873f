"""GEDI Level 2A granules to one table of the shots worth using, with values of Levels 2B and 4A joined to it.

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

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from canopy import __version__
from canopy.errors import AreaError, DataError, InputError
from canopy.files import check_output
from canopy.geo.area import AOI
from canopy.labels.granules import (
    COMPANIONS,
    L2A,
    PLACE,
    Beam,
    beams_of,
    looked_for,
    open_granule,
    shot_weights,
    typed,
    version_of,
)
from canopy.labels.shots import SUFFIXES, draw_shots, require_gedi, rh_column, write_shots
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    import pandas

DEFAULT_RH = (95, 98)
# What tells a shot from all others.
KEY = ["beam", "shot_number"]

# Filters: criterion -> rule on the columns, as pandas evaluates it; in the order in which shots are judged.
_LOOSE = {
    "sensitivity": "sensitivity >= 0.5",
    "sensitivity_a2": "sensitivity_a2 > 0.7",
    "elevation": "abs(elev_lowestmode - dem) < 150",
}
FILTERS: dict[str, dict[str, str]] = {
    "strict": {
        "quality_flag": "quality_flag == 1",
        "degrade_flag": "degrade_flag == 0",
        **_LOOSE,
        "sensitivity": "sensitivity > 0.98 or (sensitivity > 0.95 and abs(lat) >= 23.44)",
        "water": "landsat_water_persistence < 10",
        "urban": "urban_proportion < 50",
    },
    "loose": _LOOSE,
    "none": {},
}


def filter_named(name: str) -> dict[str, str]:
    """The criteria of a filter. Raises InputError for an unknown name."""
    if name not in FILTERS:
        raise InputError(f"no filter {name!r}", where="--filter", expected=", ".join(FILTERS))
    return FILTERS[name]


def _needs(rule: str) -> set[str]:
    """The columns that a rule looks at, but for the place, which every shot has."""
    return set(re.findall(r"[a-z]\w+", rule)) & set(L2A)


def apply_filter(criteria: Mapping[str, str], shots: pandas.DataFrame) -> tuple[np.ndarray, dict[str, int]]:
    """Which shots pass, bool (n,), and how many each criterion was the first to reject.

    Columns are float, missing values NaN. Criteria whose columns are not there are passed over.
    """
    good, rejected = np.ones(len(shots), bool), {}
    for name, rule in criteria.items():
        if _needs(rule) <= set(shots):
            passed = good & np.asarray(shots.eval(rule, engine="python"), bool)
            rejected[name] = int(good.sum() - passed.sum())
            good = passed
    return good, rejected


def check_rh(rh: str | Sequence[int]) -> tuple[int, ...]:
    """Percents of numbers or a text such as "95,98", without repeats. Raises InputError."""
    parts = [part for part in rh.replace(" ", ",").split(",") if part] if isinstance(rh, str) else rh
    try:
        percents = tuple(dict.fromkeys(int(part) for part in parts))
    except ValueError:
        percents = ()
    if not percents or not all(0 <= percent <= 100 for percent in percents):
        raise InputError(f"relative heights {rh!r}", where="--rh", expected="0 to 100, e.g. 95,98")
    return percents


@dataclass
class Tally:
    """Where the shots went; every shot read is in exactly one of the other counts.

    `extent` is (west, south, east, north) of all shots with a place, degrees.
    """

    read: int = 0
    no_position: int = 0
    outside: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    duplicate: int = 0
    kept: int = 0
    extent: tuple[float, float, float, float] = (180.0, 90.0, -180.0, -90.0)

    def __str__(self) -> str:
        why = ", ".join(f"{name} {count}" for name, count in self.rejected.items() if count)
        parts = [f"{self.outside} outside the area", f"{self.rejected.total()} rejected"]
        parts[1] += f" ({why})" if why else ""
        parts += [f"{self.no_position} without a place"] if self.no_position else []
        parts += [f"{self.duplicate} read before"] if self.duplicate else []
        return ", ".join(parts)


def extract_shots(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    area: AOI | None = None,
    rh: str | Sequence[int] = DEFAULT_RH,
    filter: str = "strict",
    l2b: Sequence[str | Path] = (),
    l4a: Sequence[str | Path] = (),
    quicklook: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the good shots of GEDI L2A granules to a GeoParquet (or GeoPackage) file; returns what was done.

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
        quicklook: draw a map of the shots and a histogram of their heights beside `out`, with suffix .png.

    Raises:
        AreaError: no shot of the files lies in the area; nothing was written.
        DataError: a file that is not what it should be, or no shot passed the filter.
        InputError: an impossible option. MissingDependencyError: h5py or pyarrow is not installed.
        OutputError: the disk does not take the file.
    """
    import pandas

    percents, criteria = check_rh(rh), filter_named(filter)
    names = [out, Path(out).with_suffix(".png")] if quicklook else [out]
    out, *picture = check_output(names, [*files, *l2b, *l4a], overwrite=overwrite, suffixes=SUFFIXES)
    granules = survey(files, filter)
    progress, tally = progress or NoProgress(), Tally()
    progress.start(sum(len(granule["beams"]) for granule in granules), "GEDI shots")
    tables: list[pandas.DataFrame] = []
    for granule in granules:
        with open_granule(granule["file"]) as file:
            for beam in beams_of(file, Path(granule["file"])):
                tables.append(_good_shots(beam, area, percents, criteria, tally))
                progress.advance()
    shots = pandas.concat(tables) if tables else pandas.DataFrame({name: [] for name in KEY})
    once = shots.drop_duplicates(KEY)
    tally.duplicate, tally.kept = len(shots) - len(once), len(once)
    if not tally.kept:
        raise _nothing_left(tally, area, filter)
    matched = {}
    for product, paths in (("L2B", l2b), ("L4A", l4a)):
        if paths:
            once, matched[product] = _join(once, product, paths, granules)
    once = once.reset_index(drop=True)
    names = [Path(granule["file"]).name for granule in granules]
    once.attrs = {"version": __version__, "filter": filter, "rh": list(percents), "granules": names}
    write_shots(once, out)
    for path in picture:
        draw_shots(once, path, rh_column(percents[-1]), f"{tally.kept} GEDI shots, filter {filter}")
    notes = list(_notes_on(granules, matched, tally))
    for note in notes:
        log.warning(f"note: {note}")
    return {
        "out": str(out), "quicklook": str(picture[0]) if picture else None, "filter": filter,
        "rh": list(percents), "matched": matched,
        "shots": {name: value for name, value in vars(tally).items() if name != "extent"},
        "granules": granules, "notes": notes, "summary": str(tally),
    }  # fmt: skip


def survey(files: Sequence[str | Path], filter: str = "strict") -> list[dict[str, Any]]:
    """Open every granule once and check that it can be used with the filter. Raises DataError.

    Returns for each what it holds, JSON-ready: `file`, `version` (2, 3, or None: not known), `shots`, and
    shots per beam; `absent` columns that it cannot fill, `unjudged` criteria that it cannot be held to.
    """
    require_gedi()
    paths = [Path(name) for name in files]
    for index, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:index]}:
            raise DataError("given twice", where=path, expected="every granule once")
    granules = [_survey_one(path, filter_named(filter)) for path in paths]
    for granule in granules:
        _check_version(granule["version"] if granule["beams"] else None, granule["file"], granules)
    return granules


def _check_version(version: int | None, path: str | Path, granules: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError for a file of another version than one of the L2A granules; None is not known."""
    for other in granules:
        if other["beams"] and None not in (version, other["version"]) and version != other["version"]:
            raise DataError(
                f"a granule of version {version} beside {Path(other['file']).name} of version "
                f"{other['version']}",
                where=path,
                expected="one version: their geolocation and flags differ",
                remedy="run `canopy data gedi` once for each version",
            )


def _survey_one(path: Path, criteria: Mapping[str, str]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    absent: set[str] = set()
    version = None
    with open_granule(path) as file:
        for beam in beams_of(file, path):
            if lacking := [column for column in PLACE if beam.find(column) is None]:
                raise beam.lacks(lacking)
            absent |= {column for column in L2A if beam.find(column) is None}
            if criteria and all(absent & _needs(rule) for rule in criteria.values()):
                needed = set[str]().union(*map(_needs, criteria.values()))
                raise beam.lacks([column for column in L2A if column in needed], remedy="use --filter none")
            counts[beam.name] = beam.count
            version = version_of(beam) or version
    return {
        "file": str(path), "version": version, "shots": sum(counts.values()), "beams": counts,
        "absent": [column for column in L2A if column in absent],
        "unjudged": [name for name, rule in criteria.items() if absent & _needs(rule)],
    }  # fmt: skip


def _good_shots(
    beam: Beam, area: AOI | None, rh: tuple[int, ...], criteria: Mapping[str, str], tally: Tally
) -> pandas.DataFrame:
    """The beam's shots in the area that pass: places first, then flags, then the wanted heights."""
    places = beam.table(("lon", "lat"), np.arange(beam.count))
    lon, lat = places["lon"].to_numpy(), places["lat"].to_numpy()
    placed = (np.abs(lon) <= 180) & (np.abs(lat) <= 90)
    inside = placed if area is None else placed & shapely.intersects_xy(area.lonlat, lon, lat)
    rows = np.flatnonzero(inside)
    tally.read += beam.count
    tally.no_position += int((~placed).sum())
    tally.outside += int((placed & ~inside).sum())
    if placed.any():
        w, s, e, n = tally.extent
        x, y = lon[placed], lat[placed]
        tally.extent = min(w, x.min()), min(s, y.min()), max(e, x.max()), max(n, y.max())
    shots = beam.table(("shot_number", "lat", "lon", *L2A), rows)
    good, rejected = apply_filter(criteria, shots)
    shots, tops = shots[good], [rh_column(percent) for percent in rh]
    heights = beam.read("rh", rows[good])
    assert heights is not None  # `survey` has seen it
    shots[tops] = heights[:, list(rh)]
    if criteria:
        whole = shots[tops].notna().all(axis=1)
        rejected["no_height"] = int((~whole).sum())
        shots = shots[whole]
    tally.rejected.update(rejected)
    shots = shots.assign(beam=beam.name, beam_type=beam.type, granule=beam.path.stem)
    order = ["shot_number", "beam", "beam_type", "lat", "lon", *tops, *L2A, "granule"]
    shots = typed(shots, L2A)[order]
    return shots.assign(weight=shot_weights(beam.type, shots["sensitivity"].to_numpy(np.float64)))


def _join(
    shots: pandas.DataFrame, product: str, paths: Sequence[str | Path], granules: Sequence[Mapping[str, Any]]
) -> tuple[pandas.DataFrame, int]:
    """The shots with a product's columns, and for how many it has values.

    Raises DataError for a file that is not of the product or of the granules' version, or lacks its first
    variable.
    """
    import pandas

    columns, found = list(COMPANIONS[product]), []
    for path in map(Path, paths):
        with open_granule(path, product) as file:
            for beam in beams_of(file, path):
                if beam.find(columns[0]) is None:
                    raise beam.lacks(columns[:1])
                _check_version(version_of(beam, product), path, granules)
                numbers = beam.table(("shot_number",), np.arange(beam.count))["shot_number"]
                rows = np.flatnonzero(numbers.isin(shots["shot_number"]))
                table = beam.table(("shot_number", *columns), rows).assign(beam=beam.name)
                found.append(typed(table, columns))
    values = pandas.concat(found).drop_duplicates(KEY)
    joined = shots.merge(values, how="left", on=KEY, indicator="found")
    return joined.drop(columns="found"), int((joined["found"] == "both").sum())


def _nothing_left(tally: Tally, area: AOI | None, filter: str) -> InputError:
    """The error for a run that keeps no shot."""
    what = f"none of {tally.read} shots is left: {tally}"
    west, south, east, north = tally.extent
    if area is None or west > east or tally.outside + tally.no_position < tally.read:
        remedy = None if filter == "none" else "use --filter loose or none to see what there is"
        return DataError(what, remedy=remedy)
    remedy = f"the shots lie at latitude {south:.2f} to {north:.2f}, longitude {west:.2f} to {east:.2f}"
    w, s, e, n = area.lonlat.bounds
    if s <= east and n >= west and w <= north and e >= south:
        remedy += "; with latitude and longitude swapped the area would meet them: check the order"
    return AreaError(what, where=area.describe(), remedy=remedy)


def _notes_on(granules: Sequence[dict[str, Any]], matched: dict[str, int], tally: Tally) -> Iterator[str]:
    """What the user should know about a run that went well."""
    for absent in dict.fromkeys(tuple(g["absent"]) for g in granules if g["absent"]):
        lacking = [g for g in granules if tuple(g["absent"]) == absent]
        names = Path(lacking[0]["file"]).name if len(lacking) == 1 else f"{len(lacking)} granules"
        yield f"{names}: no {looked_for(absent)}; left empty there"
        if lacking[0]["unjudged"]:
            yield f"{names}: the shots were not judged by {', '.join(lacking[0]['unjudged'])}"
    yield from (f"{Path(g['file']).name}: holds no shots" for g in granules if not g["beams"])
    for product, count in matched.items():
        if count < tally.kept:
            yield f"{product}: values for {count} of {tally.kept} shots"
