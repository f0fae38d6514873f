"""GEDI granules: HDF5 files of Levels 2A, 2B and 4A, read beam by beam.

A variable is looked for under several names, first match first, so that a granule's version is told by what
it holds and never by its file name. Version 3 renamed the quality flags (`l2a_quality_flag_rel3`; a plain
`quality_flag`, where one remains beside it, means less) and moved Level 2B's coordinates to the beam's root.
Data dictionaries: GEDI L2A and L2B product data dictionaries (LP DAAC), GEDI04_A user guide (ORNL DAAC).
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import CanopyError, DataError
from canopy.files import check_name
from canopy.labels.shots import instants

if TYPE_CHECKING:
    import h5py
    import pandas

BEAM_TYPE = {
    **dict.fromkeys(("BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011"), "full"),
    **dict.fromkeys(("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011"), "coverage"),
}
# Coverage beams carry half the energy of the full-power ones (Dubayah et al. 2020).
BEAM_WEIGHT = {"full": 1.0, "coverage": 0.5}
# Fill values of GEDI's floats are -9999 and -999999, that of its bytes is 255.
FILL_BELOW = -9_998.5
RH_COUNT = 101
QUALITY_V3 = "l2a_quality_flag_rel3"

# Output column -> names inside a beam's group, in the order they are looked for. What no shot can lack:
PLACE: dict[str, tuple[str, ...]] = {
    "shot_number": ("shot_number", "geolocation/shot_number"),
    "lat": ("lat_lowestmode", "geolocation/lat_lowestmode"),
    "lon": ("lon_lowestmode", "geolocation/lon_lowestmode"),
    "rh": ("rh",),
}
# The other columns of Level 2A, in the order of the output.
L2A: dict[str, tuple[str, ...]] = {
    "sensitivity": ("sensitivity", "geolocation/sensitivity"),
    "sensitivity_a2": ("geolocation/sensitivity_a2", "sensitivity_a2"),
    "quality_flag": (QUALITY_V3, "quality_flag"),
    "degrade_flag": ("degrade_flag", "geolocation/degrade_flag"),
    "solar_elevation": ("solar_elevation", "geolocation/solar_elevation"),
    "elev_lowestmode": ("elev_lowestmode", "geolocation/elev_lowestmode"),
    "dem": ("digital_elevation_model", "geolocation/digital_elevation_model"),
    "landsat_water_persistence": ("land_cover_data/landsat_water_persistence",),
    "urban_proportion": ("land_cover_data/urban_proportion",),
    "time": ("delta_time", "geolocation/delta_time"),
}
# Level 2B: canopy cover (0..1) and plant area index (m2/m2). Level 4A: aboveground biomass density (Mg/ha).
COMPANIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "L2B": {
        "cover": ("cover",),
        "pai": ("pai",),
        "l2b_quality_flag": ("l2b_quality_flag_rel3", "l2b_quality_flag"),
    },
    "L4A": {"agbd": ("agbd",), "l4_quality_flag": ("l4a_quality_flag_rel3", "l4_quality_flag")},
}
NAMES = {**PLACE, **L2A, **COMPANIONS["L2B"], **COMPANIONS["L4A"]}
# Bytes, null where missing; all other columns but places and times are float32.
FLAGS = frozenset(
    ("quality_flag", "degrade_flag", "landsat_water_persistence", "urban_proportion", "l2b_quality_flag",
     "l4_quality_flag")
)  # fmt: skip


@dataclass(frozen=True)
class Beam:
    """One beam of an open granule with `count` shots; `type` is full, coverage or None."""

    path: Path
    name: str
    group: h5py.Group
    count: int
    type: str | None

    def find(self, column: str) -> h5py.Dataset | None:
        """The dataset of a column under the first of its names that is there."""
        return next((self.group[name] for name in NAMES[column] if name in self.group), None)

    def lacks(self, columns: Iterable[str], remedy: str | None = None) -> DataError:
        """The error for variables that are not there, with every name that was looked for."""
        return DataError(f"no {looked_for(columns)}", where=f"{self.path}, {self.name}", remedy=remedy)

    def read(self, column: str, rows: np.ndarray) -> np.ndarray | None:
        """Values of the shots `rows` (ascending); None where the granule has no such variable.

        uint64 for the shot number, float32 (n, 101) for "rh", else float64 (n,); NaN for missing.
        """
        dataset = self.find(column)
        if dataset is None:
            return None
        if dataset.shape != ((self.count, RH_COUNT) if column == "rh" else (self.count,)):
            raise DataError(
                f"{dataset.name} has shape {dataset.shape}", where=self.path, expected=f"{self.count} shots"
            )
        # One slice from the file is far quicker than a list of rows.
        values = dataset[int(rows[0]) : int(rows[-1]) + 1][rows - rows[0]] if len(rows) else dataset[:0]
        if column == "shot_number":
            return values.astype(np.uint64)
        numbers = values.astype(np.float32 if column == "rh" else np.float64)
        missing = (numbers < 0) | (numbers >= 255) if column in FLAGS else numbers <= FILL_BELOW
        return np.where(missing, np.nan, numbers)

    def table(self, columns: Iterable[str], rows: np.ndarray) -> pandas.DataFrame:
        """The columns that the granule has, for the shots `rows` (ascending); see `read`."""
        import pandas

        values = {column: self.read(column, rows) for column in columns}
        return pandas.DataFrame({name: found for name, found in values.items() if found is not None})


def typed(shots: pandas.DataFrame, columns: Iterable[str]) -> pandas.DataFrame:
    """Columns as they are written, the absent ones empty: floats, nullable bytes, instants."""
    shots = shots.reindex(columns=list(dict.fromkeys([*shots.columns, *columns])))
    for name in columns:
        kind = "UInt8" if name in FLAGS else "float32"
        shots[name] = instants(shots[name]) if name == "time" else shots[name].astype(kind)
    return shots


@contextlib.contextmanager
def open_granule(path: str | Path, product: str = "L2A") -> Iterator[h5py.File]:
    """An open GEDI file of a product ("L2A", "L2B", "L4A"), read only.

    Raises DataError for what is missing, no HDF5, truncated or damaged (also while it is read), or another
    product.
    """
    import h5py

    path = Path(check_name(path, DataError))
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise DataError(what, where=path, expected="a GEDI .h5 file", remedy="check the path")
    if zipfile.is_zipfile(path) and not h5py.is_hdf5(path):
        raise DataError("a zip archive", where=path, expected="a GEDI .h5 file", remedy="unpack it first")
    try:
        with h5py.File(path, "r") as file:
            named = str(np.ravel(file.attrs.get("short_name", ""))[0])  # text, bytes, or an array of them
            level = re.search(r"GEDI.*?([1-4])_?([A-D])(?![A-Z0-9])", named.upper())
            if level and f"L{level[1]}{level[2]}" != product:
                raise DataError(f"the product {named}", where=path, expected=f"GEDI {product}")
            yield file
    except CanopyError:
        raise
    except (OSError, RuntimeError) as error:  # what HDF5 says of damaged chunks, and of no HDF5 at all
        raise DataError(
            f"cannot be read ({str(error)[:160]})",
            where=path,
            expected="a whole GEDI .h5 file",
            remedy="it is truncated, damaged or another format; download it again",
        ) from error


def beams_of(file: h5py.File, path: Path) -> list[Beam]:
    """The beams that hold shots, by name. Raises DataError for a file without any beam group."""
    names = [name for name in sorted(file) if re.fullmatch(r"BEAM[01]{4}", name)]
    if not names:
        found = ", ".join(sorted(file)[:5]) or "nothing"
        raise DataError(f"no beams; it holds {found}", where=path, expected="groups BEAM0000 to BEAM1011")
    beams = []
    for name in names:
        beam = Beam(path, name, file[name], 0, BEAM_TYPE.get(name))
        numbers = beam.find("shot_number")
        # Subsets keep the groups of beams that never crossed their area, with or without empty tables.
        if numbers is None and "rh" in file[name]:
            raise beam.lacks(["shot_number"])
        if numbers is not None and len(numbers):
            beams.append(replace(beam, count=len(numbers)))
    return beams


def version_of(beam: Beam, product: str = "L2A") -> int | None:
    """3 or 2, by the name of the quality flag; None where the file was cut out without one."""
    flags = NAMES[{"L2A": "quality_flag", "L2B": "l2b_quality_flag", "L4A": "l4_quality_flag"}[product]]
    return next((version for version, name in zip((3, 2), flags, strict=True) if name in beam.group), None)


def looked_for(columns: Iterable[str]) -> str:
    """Columns with all the names that their variables go by."""
    return "; ".join(f"{column} (looked for {', '.join(NAMES[column])})" for column in columns)


def shot_weights(beam_type: str | None, sensitivity: np.ndarray) -> np.ndarray:
    """How much each shot counts in the footprint loss, float32 (n,) in 0..1; GEDI scores count all alike.

    The beam's share (full power 1, coverage 0.5) times a ramp in sensitivity, the canopy cover through which
    the pulse still reaches the ground: 0 at 0, 0.25 at 0.5 (the loose filter's limit), 1 from 0.95 up. A
    missing sensitivity counts as 0.5, an unknown beam as a coverage beam. Flags are the filters' business.
    """
    known = np.where(np.isfinite(sensitivity), sensitivity, 0.5)
    ramp = np.interp(known, [0.0, 0.5, 0.95], [0.0, 0.25, 1.0])
    return (BEAM_WEIGHT.get(beam_type or "", BEAM_WEIGHT["coverage"]) * ramp).astype(np.float32)
