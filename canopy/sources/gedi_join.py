"""Values of GEDI Levels 2B and 4A for shots of Level 2A, found by shot number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from canopy.sources.gedi_h5 import Beam, beams_of, open_granule
from canopy.sources.gedi_names import COMPANIONS, SHOT_NUMBER


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
