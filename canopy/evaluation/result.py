"""What an evaluation found: frozen records, from which metrics.json, the tables and the report are written.

`Evaluation.to_dict` is metrics.json; its keys are a promise to other people's scripts (docs/evaluation.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """One number with its uncertainty.

    Attributes:
        value: None where it does not exist (no pixels, a constant map, no such thing for this reference).
        ci95: lower and upper end of the 95 % interval; None where it cannot be given.
        note: why `value` or `ci95` is None.
    """

    value: float | None
    ci95: tuple[float, float] | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """{"value": x, "ci95": [lo, hi]}, with "note" where something is missing."""
        plain: dict[str, Any] = {"value": self.value, "ci95": list(self.ci95) if self.ci95 else None}
        return plain | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class HeightBin:
    """Scores of the pixels whose REFERENCE height lies in low_m <= h < high_m (high_m None: no upper end)."""

    low_m: float
    high_m: float | None
    scores: Mapping[str, Score]  # n, bias_m, mae_m, rmse_m; interval_* where bounds are judged

    @property
    def name(self) -> str:
        """ "5-10", "60+"."""
        return f"{self.low_m:g}+" if self.high_m is None else f"{self.low_m:g}-{self.high_m:g}"


@dataclass(frozen=True)
class Scores:
    """All scores of one set of pixels or samples.

    Attributes:
        metrics: name -> score, in the order to print them: n, mae_m, rmse_m, bias_m, r2, r, nmae, block_r2,
            edge_error, cover_{iou,precision,recall,f1}_{2,3,5}m, p{50,95,98}_error_m, ... ; and
            interval_coverage, interval_width_m where the map carries bounds (with a note where they cannot be
            judged).
        by_height: the same pixels by reference height.
    """

    metrics: Mapping[str, Score]
    by_height: tuple[HeightBin, ...]

    def __getitem__(self, name: str) -> Score:
        return self.metrics[name]

    @property
    def n(self) -> int:
        """Pixels or samples scored."""
        return int(self.metrics["n"].value or 0)

    def to_dict(self) -> dict[str, Any]:
        """Every metric as {"value", "ci95"}; `by_height` has both per bin."""
        bins = {b.name: b.scores for b in self.by_height}
        value = {name: {k: s.value for k, s in scores.items()} for name, scores in bins.items()}
        ci95 = {
            name: {k: list(s.ci95) if s.ci95 else None for k, s in scores.items()}
            for name, scores in bins.items()
        }
        plain = {name: score.to_dict() for name, score in self.metrics.items()}
        return plain | {"by_height": {"value": value, "ci95": ci95}}


@dataclass(frozen=True)
class Stratum:
    """Scores of one part: `by` is what it was cut by ("site", "slope", a column), `name` is the part."""

    by: str
    name: str
    scores: Scores


@dataclass(frozen=True)
class MapShift:
    """Where the map lies relative to the reference: the map's content is displaced by (east_m, north_m).

    Attributes:
        fit: correlation (-1..1) of the structures at this displacement; fit_unshifted: at none.
        spread_m: how far the displacements of single windows scatter round it (None: one window).
        windows: how many were used.
        sure: whether it may be acted upon; `note` says why not.
    """

    east_m: float
    north_m: float
    fit: float
    fit_unshifted: float
    spread_m: float | None
    windows: int
    sure: bool
    note: str | None = None

    @property
    def length_m(self) -> float:
        """Length of the displacement."""
        return math.hypot(self.east_m, self.north_m)

    def to_dict(self) -> dict[str, Any]:
        """All facts, for metrics.json's "shift"."""
        names = (
            "east_m",
            "north_m",
            "length_m",
            "fit",
            "fit_unshifted",
            "spread_m",
            "windows",
            "sure",
            "note",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class JointHistogram:
    """How often which pair of heights occurs: counts[i, j] for reference in edges_m[i:i+2] and map in
    edges_m[j:j+2]; the last bin also takes everything higher, the first everything lower."""

    edges_m: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockTable:
    """One row per spatial block that has scored pixels; every array is (blocks,).

    Attributes:
        site: name of the reference (index into `sites`).
        west, south, east, north: of the block in the CRS `crs[site]`, lon, lat: its centre in degrees.
        n, map_mean_m, reference_mean_m, bias_m, mae_m: of its pixels or samples.
        side_m: side of the blocks, ground metres.
    """

    sites: tuple[str, ...]
    crs: tuple[str, ...]
    side_m: float
    site: np.ndarray
    west: np.ndarray
    south: np.ndarray
    east: np.ndarray
    north: np.ndarray
    lon: np.ndarray
    lat: np.ndarray
    n: np.ndarray
    map_mean_m: np.ndarray
    reference_mean_m: np.ndarray
    bias_m: np.ndarray
    mae_m: np.ndarray

    def __len__(self) -> int:
        return len(self.n)


@dataclass(frozen=True, eq=False)
class Preview:
    """A small picture of both sides on one grid; float32 (h, w) metres, NaN where not scored, h, w <= 1500.

    Attributes:
        bounds: (west, south, east, north) in `crs`; gsd_m: ground metres per preview pixel.
    """

    site: str
    map_m: np.ndarray
    reference_m: np.ndarray
    bounds: tuple[float, float, float, float]
    crs: str
    gsd_m: float

    @property
    def error_m(self) -> np.ndarray:
        """Map minus reference."""
        return self.map_m - self.reference_m


@dataclass(frozen=True, eq=False)
class Samples:
    """Footprints or plots that were scored (a random 20,000 where there are more); arrays are (n,)."""

    lon: np.ndarray
    lat: np.ndarray
    reference_m: np.ndarray
    map_m: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `canopy evaluate`.

    Attributes:
        kind: chm, gedi or plots.
        overall: scores as the map is; corrected: after undoing the measured shift (None: see `shift`).
        shift: None where it cannot be measured; `shift_note` says why.
        strata: in the order of --by; empty if none was asked for.
        previews: one per reference raster (none for GEDI and plots, which have `samples`).
        provenance: plain data: files and their sha256, grids, rules, dates and gap, bootstrap, versions.
        notes: what a reader must know, one sentence each.
    """

    kind: str
    overall: Scores
    corrected: Scores | None
    shift: MapShift | None
    shift_note: str | None
    strata: tuple[Stratum, ...]
    joint: JointHistogram
    blocks: BlockTable
    previews: tuple[Preview, ...]
    samples: Samples | None
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """metrics.json: plain data without NaN."""
        strata: dict[str, dict[str, Any]] = {}
        for stratum in self.strata:
            strata.setdefault(stratum.by, {})[stratum.name] = stratum.scores.to_dict()
        shift = self.shift
        plain = {
            "kind": self.kind,
            "overall": self.overall.to_dict(),
            "shift_m": {"east": shift.east_m, "north": shift.north_m} if shift else None,
            "shift": shift.to_dict() if shift else {"note": self.shift_note},
            "corrected": self.corrected.to_dict() if self.corrected else None,
            "strata": strata,
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }
        return _without_nan(plain)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: None stands for it; numpy numbers become Python's."""
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
