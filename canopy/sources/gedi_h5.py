"""Opening GEDI granules and reading their beams piece by piece.

Only what is asked for is read: columns of one number per shot in blocks, and of the 101 relative heights the
wanted columns of the wanted shots, along the HDF5 chunks that hold them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import CanopyError, DataError, MissingDependencyError
from canopy.geo.paths import check_name
from canopy.sources.gedi_names import BEAM_NAME, FILL_BELOW, RH_COUNT, RH_PATH, SHOT_NUMBER, Variable

if TYPE_CHECKING:
    import h5py

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
