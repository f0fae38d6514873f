"""What became of the GEDI shots that were read: counts, notes, and the error when nothing is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from canopy.errors import AreaError, DataError, InputError
from canopy.geo.aoi import AOI
from canopy.sources.gedi_names import L2A, TIME


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
