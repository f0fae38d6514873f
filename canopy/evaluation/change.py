"""Whether a pixel has changed between two dates: the difference of two uncertain heights. Pure arithmetic.

With B - A the change, the interval of the difference is recovered from each map's own interval (the MOVER
method; Zou and Donner, Statistics in Medicine 27, 2008, 1693-1702, doi 10.1002/sim.3095), which needs no
symmetry of either:

    lower = (b - a) - sqrt((b - l_b)^2 + (u_a - a)^2)
    upper = (b - a) + sqrt((u_b - b)^2 + (a - l_a)^2)

The change is significant where that interval does not hold 0. Both maps' errors count as independent; errors
that two dates of one model share cancel, so for them the rule errs towards "no change".

How far two maps of one place agree: sums that are filled window by window and give every number at the
end.

`canopy compare`: two height maps of one place, as two products or as two dates.

What `canopy compare` leaves behind besides its maps: compare.json, the tables, and report.html.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from canopy import __version__
from canopy.errors import ConfigError, InputError, OutputError
from canopy.evaluation import figures
from canopy.evaluation.maps import (
    BlockSums,
    HeightProduct,
    HeightWindow,
    PairWindow,
    common_grid,
    dates_text,
    open_product,
    pair_windows,
    preview_side,
    years_apart,
)
from canopy.evaluation.report import Page, number_text
from canopy.files import told_as_output
from canopy.geo.area import AOI
from canopy.geo.cog import CogWriter
from canopy.geo.encoding import BandSpec
from canopy.geo.grid import Grid
from canopy.metrics import HEIGHT_BINS_M, height_bin
from canopy.runtime import Progress

# Where nothing else is known: about the RMSE of the best published models on lidar (Open-Canopy: 4.02 m).
ASSUMED_SIGMA_M = 4.0
NO_CHANGE, GAIN, LOSS, CANOPY_GAIN, CANOPY_LOSS = 1, 2, 3, 4, 5
CLASSES = {
    NO_CHANGE: "no significant change",
    GAIN: "taller",
    LOSS: "lower",
    CANOPY_GAIN: "canopy gained",
    CANOPY_LOSS: "canopy lost",
}


@dataclass(frozen=True)
class MapError:
    """How uncertain one map's pixel is.

    Attributes:
        sigma_m: standard deviation in metres; None: the map's own interval bands.
        level: nominal coverage of those bands.
        step_m: what heights are rounded to; adds a uniform error of one step.
        source: where this came from, for the report.
    """

    sigma_m: float | None
    level: float | None
    step_m: float
    source: str


def choose_error(side: str, sigma_m: float | None, level: float | None, step_m: float) -> MapError:
    """The error of a map: what the user says, else its interval bands, else the stated assumption.

    Raises InputError for a sigma that is not above 0.
    """
    if sigma_m is not None:
        if not 0 < sigma_m < 100:
            raise InputError(
                f"{sigma_m:g} m", where=f"--sigma-{side}", expected="metres, above 0 and below 100"
            )
        return MapError(sigma_m, None, step_m, f"--sigma-{side} {sigma_m:g} m")
    if level is not None:
        return MapError(None, level, step_m, f"its own {level:.0%} interval bands")
    return MapError(
        ASSUMED_SIGMA_M, None, step_m,
        f"ASSUMED: {ASSUMED_SIGMA_M:g} m, about the RMSE of the best published models; give --sigma-{side}",
    )  # fmt: skip


def half_widths(window: HeightWindow, error: MapError, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances (down, up) from a map's height to the ends of its interval of z standard deviations, (h,
    w).
    """
    rounding = error.step_m**2 / 12 * z**2
    if error.sigma_m is not None:
        width = np.full(window.height_m.shape, np.sqrt((z * error.sigma_m) ** 2 + rounding))
        return width, width
    if window.lower_m is None or window.upper_m is None or error.level is None:
        raise InputError("a map without interval bands", expected="height_lower and height_upper")
    factor = z / NormalDist().inv_cdf((1 + error.level) / 2)
    # A calibrated interval may leave its own height outside by rounding; a width is never negative.
    down = factor * np.maximum(window.height_m - window.lower_m, 0).astype(np.float64)
    up = factor * np.maximum(window.upper_m - window.height_m, 0).astype(np.float64)
    return np.sqrt(down**2 + rounding), np.sqrt(up**2 + rounding)


def difference_interval(
    a: HeightWindow, b: HeightWindow, errors: tuple[MapError, MapError], z: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Change b - a and the ends (lower, upper) of its interval of z standard deviations, float64 (h, w)
    metres.
    """
    change = b.height_m.astype(np.float64) - a.height_m
    a_down, a_up = half_widths(a, errors[0], z)
    b_down, b_up = half_widths(b, errors[1], z)
    return change, change - np.hypot(b_down, a_up), change + np.hypot(b_up, a_down)


def classify(
    a: np.ndarray, b: np.ndarray, lower: np.ndarray, upper: np.ndarray, cover_m: float
) -> np.ndarray:
    """Classes (see `CLASSES`) uint8 (h, w): only significant changes; canopy is height > `cover_m`."""
    up, down = lower > 0, upper < 0
    before, after = a > cover_m, b > cover_m
    classes = np.full(a.shape, NO_CHANGE, np.uint8)
    classes[up], classes[down] = GAIN, LOSS
    classes[up & ~before & after] = CANOPY_GAIN
    classes[down & before & ~after] = CANOPY_LOSS
    return classes


def z_of(confidence: float) -> float:
    """Two-sided normal quantile of a confidence. Raises InputError outside 0.5 to 0.9999."""
    if not 0.5 <= confidence <= 0.9999:
        raise InputError(f"{confidence:g}", where="--confidence", expected="0.5 to 0.9999")
    return NormalDist().inv_cdf((1 + confidence) / 2)


COVER_HEIGHTS_M = (2.0, 5.0, 10.0)
WITHIN_M = (1.0, 2.0, 5.0)
JOINT_TOP_M = 80
# Percentiles of differences are read off a histogram of this step: exact to half of it.
STEP_M = 0.05
SPAN_M = 120.0
QUANTILES = (0.05, 0.5, 0.95)


@dataclass
class PairSums:
    """Everything that is summed over the pixels valid in both maps. Differences are B - A.

    `cover[i]` holds the ground areas (A open/canopy, B open/canopy) at `thresholds[i]`, square metres.
    """

    thresholds: Sequence[float] = COVER_HEIGHTS_M
    n: int = 0
    area_m2: float = 0.0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(7))  # a, b, aa, bb, ab, |d|, dd
    within: np.ndarray = field(default_factory=lambda: np.zeros(len(WITHIN_M)))
    differences: np.ndarray = field(default_factory=lambda: np.zeros(round(2 * SPAN_M / STEP_M), np.int64))
    joint: np.ndarray = field(default_factory=lambda: np.zeros((JOINT_TOP_M, JOINT_TOP_M), np.int64))
    by_height: np.ndarray = field(default_factory=lambda: np.zeros((len(HEIGHT_BINS_M), 4)))

    def __post_init__(self) -> None:
        self.cover = np.zeros((len(self.thresholds), 2, 2))

    def add(self, a: np.ndarray, b: np.ndarray, area: np.ndarray) -> None:
        """Add pixels: heights of both maps (n,) in metres and their ground area (n,) in square metres."""
        if not a.size:
            return
        a, b = a.astype(np.float64), b.astype(np.float64)
        d = b - a
        self.n += a.size
        self.area_m2 += float(area.sum())
        self.sums += [a.sum(), b.sum(), a @ a, b @ b, a @ b, np.abs(d).sum(), d @ d]
        self.within += [np.count_nonzero(np.abs(d) <= limit) for limit in WITHIN_M]
        steps = np.clip(((d + SPAN_M) / STEP_M).astype(np.int64), 0, self.differences.size - 1)
        self.differences += np.bincount(steps, minlength=self.differences.size)
        i, j = (np.clip(x, 0, JOINT_TOP_M - 1).astype(np.int64) for x in (a, b))
        self.joint += np.bincount(i * JOINT_TOP_M + j, minlength=JOINT_TOP_M**2).reshape(self.joint.shape)
        for k, threshold in enumerate(self.thresholds):
            state = (a > threshold) * 2 + (b > threshold)
            self.cover[k] += np.bincount(state, weights=area, minlength=4).reshape(2, 2)
        bins = height_bin((a + b) / 2)
        for column, weights in enumerate((None, d, np.abs(d), d * d)):
            self.by_height[:, column] += np.bincount(bins, weights, minlength=len(HEIGHT_BINS_M))

    # ---- results ------------------------------------------------------------------------------
    def overall(self) -> dict[str, float | int | None]:
        """n, area, means, mean difference, MAE, RMSE, r, percentiles, shares within 1, 2, 5 m."""
        n = self.n
        sa, sb, saa, sbb, sab, sabs, sdd = (float(v) for v in self.sums)
        va, vb, cab = saa - sa * sa / n, sbb - sb * sb / n, sab - sa * sb / n
        flat = min(va, vb) <= 1e-9 * n
        return {
            "n": n,
            "area_ha": self.area_m2 / 1e4,
            "mean_a_m": sa / n,
            "mean_b_m": sb / n,
            "mean_difference_m": (sb - sa) / n,
            "mean_absolute_difference_m": sabs / n,
            "rms_difference_m": (sdd / n) ** 0.5,
            "r": None if flat else cab / (va * vb) ** 0.5,
            **{f"p{round(100 * q):02d}_difference_m": self.quantile(q) for q in QUANTILES},
            **{f"within_{limit:g}m": float(s) / n for limit, s in zip(WITHIN_M, self.within, strict=True)},
        }

    def quantile(self, q: float) -> float:
        """Quantile of the differences, exact to half of `STEP_M`."""
        cumulated = np.cumsum(self.differences)
        index = int(np.searchsorted(cumulated, q * cumulated[-1], side="left"))
        return round((index + 0.5) * STEP_M - SPAN_M, 6)

    def cover_rows(self) -> list[dict[str, Any]]:
        """Per threshold: hectares of each combination, share of ground that agrees, and the overlap (IoU)."""
        rows = []
        for threshold, ((open_both, only_b), (only_a, both)) in zip(self.thresholds, self.cover, strict=True):
            union = only_a + only_b + both
            rows.append(
                {
                    "above_m": threshold,
                    "both_ha": both / 1e4,
                    "only_a_ha": only_a / 1e4,
                    "only_b_ha": only_b / 1e4,
                    "neither_ha": open_both / 1e4,
                    "cover_a": (only_a + both) / self.area_m2,
                    "cover_b": (only_b + both) / self.area_m2,
                    "agree": (open_both + both) / self.area_m2,
                    "iou": both / union if union > 0 else None,
                }
            )
        return rows

    def height_rows(self) -> list[dict[str, Any]]:
        """Differences by the mean height of both maps: neither side is taken for the truth."""
        rows = []
        for k, (count, d, absolute, square) in enumerate(self.by_height):
            high = HEIGHT_BINS_M[k + 1] if k + 1 < len(HEIGHT_BINS_M) else None
            rows.append(
                {
                    "low_m": HEIGHT_BINS_M[k],
                    "high_m": high,
                    "n": int(count),
                    "mean_difference_m": d / count if count else None,
                    "mean_absolute_difference_m": absolute / count if count else None,
                    "rms_difference_m": (square / count) ** 0.5 if count else None,
                }
            )
        return rows


MODES = ("auto", "products", "dates")
COVER_CLASSES = {1: "open in both", 2: "canopy in A only", 3: "canopy in B only", 4: "canopy in both"}
# Two maps of one model whose imagery is this far apart are two dates, not two products.
DATES_APART_YEARS = 0.5


@dataclass(frozen=True)
class CompareOptions:
    """What `canopy compare` can be asked.

    Attributes:
        mode: "products", "dates" (A is the earlier one) or "auto".
        gsd: ground metres per pixel of the common grid; None: the coarser map's own pixels.
        cover_m: canopy is what is higher.
        block_m: side of the blocks of the table, ground metres.
        confidence: of a change (dates).
        sigma_a, sigma_b: standard deviation of each map's pixel in metres (dates).
        nodata_a, nodata_b: values that mean missing, in place of what the files say.
        report: whether to draw report.html.
    """

    mode: str = "auto"
    gsd: float | None = None
    cover_m: float = 2.0
    block_m: float = 100.0
    confidence: float = 0.95
    sigma_a: float | None = None
    sigma_b: float | None = None
    nodata_a: float | None = None
    nodata_b: float | None = None
    overwrite: bool = False
    report: bool = True

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if self.mode not in MODES:
            raise ConfigError(f"{self.mode!r}", where="--as", expected=", ".join(MODES))
        for name, value, top in (("--cover-height", self.cover_m, 50), ("--block-m", self.block_m, 1e5)):
            if not 0 < value <= top:
                raise ConfigError(f"{value:g} m", where=name, expected=f"above 0, up to {top:g}")
        z_of(self.confidence)


@dataclass(eq=False)
class Comparison:
    """What was found; the arrays are for the report, `to_dict` is compare.json."""

    mode: str
    facts: dict[str, Any]
    sums: PairSums
    blocks: BlockSums
    preview: BlockSums
    classes_ha: dict[str, float] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {"mode": self.mode, **self.facts, "overall": self.sums.overall()}
        if self.mode == "dates":
            plain |= {"change": {"rule": self.rule, "area_ha": self.classes_ha}}
        return plain | {
            "cover": self.sums.cover_rows(),
            "by_height": self.sums.height_rows(),
            "notes": self.notes,
        }


def compare(
    a: Any,
    b: Any,
    out: str | Path,
    options: CompareOptions | None = None,
    *,
    area: AOI | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two height maps (anything `open_product` takes) and write maps, tables and a report to `out`.

    Differences are B - A. Products: difference.tif, cover.tif. Dates: change.tif (change and its interval),
    classes.tif. Both: compare.json, summary.csv, cover.csv, by_height.csv, blocks.csv, report.html.

    Raises InputError for maps that cannot be read or do not meet, impossible options, or existing outputs
    without `overwrite`; nothing is written then.
    """
    options = options or CompareOptions()
    options.check()
    with open_product(a, nodata=options.nodata_a) as one, open_product(b, nodata=options.nodata_b) as two:
        mode, why = choose_mode(one, two, options.mode)
        grid = common_grid(one, two, area, options.gsd)
        with staging(Path(out), options.overwrite) as folder:
            run = _Run(one, two, grid, mode, options)
            found = run.walk(folder, area, progress)
            found.facts["mode_because"] = why

            write_files(found, folder, options.report)
    return found


def choose_mode(a: HeightProduct, b: HeightProduct, asked: str) -> tuple[str, str]:
    """ "products" or "dates", and why."""
    if asked != "auto":
        return asked, "asked for"
    same = a.tags.get("CANOPY_MODEL_SHA256") or a.kind, b.tags.get("CANOPY_MODEL_SHA256") or b.kind
    years = years_apart(a.dates, b.dates)
    if same[0] == same[1] and years is not None and abs(years) >= DATES_APART_YEARS:
        if years < 0:
            raise InputError(
                f"A is of {dates_text(a.dates)}, B of {dates_text(b.dates)}", where=f"{a.name}, {b.name}",
                expected="the earlier map first", remedy="swap them, or add --as products",
            )  # fmt: skip
        return "dates", "one product, imagery of different dates"
    return "products", "not known to be two dates of one product; --as dates compares them as such"


# Of the canopy of A: beyond this share "no significant change" says more of the errors than of the trees.
_BLIND_SHARE = 0.1


class _Run:
    """One walk over the common grid."""

    def __init__(
        self, a: HeightProduct, b: HeightProduct, grid: Grid, mode: str, options: CompareOptions
    ) -> None:
        self.a, self.b, self.grid, self.options, self.mode = a, b, grid, options, mode
        self.dates = mode == "dates"
        classes = CLASSES if self.dates else COVER_CLASSES
        self.class_sums = [f"class_{code}" for code in classes]
        self.classes_m2 = dict.fromkeys(classes, 0.0)
        names = ["a", "b", "abs", "area", *self.class_sums]
        self.blocks = BlockSums(grid, max(1, round(options.block_m / grid.gsd_m)), names)
        self.preview = BlockSums(grid, preview_side(grid), ["a", "b", *self.class_sums])
        thresholds = sorted({2.0, 5.0, 10.0, float(options.cover_m)})
        self.sums = PairSums(thresholds)
        self.notes = [*a.notes, *b.notes]
        self.canopy_m2 = self.blind_m2 = 0.0
        if self.dates:
            self.z = z_of(options.confidence)
            self.errors = (
                choose_error("a", options.sigma_a, a.level, a.step_m),
                choose_error("b", options.sigma_b, b.level, b.step_m),
            )

    def walk(self, folder: Path, area: AOI | None, progress: Progress | None) -> Comparison:
        windows = pair_windows(self.a, self.b, self.grid, area=area, interval=self.dates, progress=progress)
        with contextlib.ExitStack() as stack:
            values, classes = (stack.enter_context(writer) for writer in self._writers(folder))
            for window in windows:
                stored, codes = self._changed(window) if self.dates else self._differs(window)
                at = window.row, window.col
                values.write(stored.astype(np.float32), window.valid, *at)
                classes.write(codes[None].astype(np.float32), window.valid, *at)
                self._count(window, codes)
            if self.sums.n == 0:
                raise InputError(
                    "no pixel is valid in both maps", where=f"{self.a.name}, {self.b.name}",
                    remedy="check their nodata rules (--nodata-a, --nodata-b)",
                )  # fmt: skip
        return self._comparison(area)

    def _writers(self, folder: Path) -> tuple[CogWriter, CogWriter]:
        tags = {
            "CANOPY_VERSION": __version__, "CANOPY_COMPARED_A": self.a.name, "CANOPY_COMPARED_B": self.b.name,
        }  # fmt: skip
        if self.dates:
            bands = [BandSpec("change"), BandSpec("change_lower"), BandSpec("change_upper")]
            first, second, codes = "change.tif", "classes.tif", CLASSES
        else:
            bands = [BandSpec("difference")]
            first, second, codes = "difference.tif", "cover.tif", COVER_CLASSES
        legend = "; ".join(f"{code} {name}" for code, name in codes.items())
        return (
            CogWriter(folder / first, self.grid, bands, tags=tags),
            CogWriter(
                folder / second, self.grid, [BandSpec("class", "1", 1.0)], encoding="uint8m",
                tags=tags | {"CANOPY_CLASSES": legend}, overviews="mode",
            ),
        )  # fmt: skip

    def _differs(self, window: PairWindow) -> tuple[np.ndarray, np.ndarray]:
        a, b = window.a.height_m, window.b.height_m
        codes = 1 + (a > self.options.cover_m) + 2 * (b > self.options.cover_m).astype(np.uint8)
        return (b - a)[None], codes

    def _changed(self, window: PairWindow) -> tuple[np.ndarray, np.ndarray]:
        change, lower, upper = difference_interval(window.a, window.b, self.errors, self.z)
        codes = classify(window.a.height_m, window.b.height_m, lower, upper, self.options.cover_m)
        canopy = window.valid & (window.a.height_m > self.options.cover_m)
        self.canopy_m2 += float(window.area_m2[canopy].sum())
        # Were it to fall to the ground, its change would be minus its height: would the interval hold 0?
        blind = canopy & (window.a.height_m <= upper - change)
        self.blind_m2 += float(window.area_m2[blind].sum())
        return np.stack([change, lower, upper]), codes

    def _count(self, window: PairWindow, codes: np.ndarray) -> None:
        valid, a, b, area = window.valid, window.a.height_m, window.b.height_m, window.area_m2
        self.sums.add(a[valid], b[valid], area[valid])
        members = {f"class_{code}": codes == code for code in self.classes_m2}
        for code in self.classes_m2:
            self.classes_m2[code] += float(area[valid & members[f"class_{code}"]].sum())
        at = window.row, window.col
        self.preview.add(*at, valid, {"a": a, "b": b, **members})
        by_area = {name: np.where(member, area, 0) for name, member in members.items()}
        self.blocks.add(*at, valid, {"a": a, "b": b, "abs": np.abs(b - a), "area": area, **by_area})

    def _comparison(self, area: AOI | None) -> Comparison:
        grid = self.grid
        facts = {
            "a": _side_facts(self.a),
            "b": _side_facts(self.b),
            "years_apart": years_apart(self.a.dates, self.b.dates),
            "grid": {
                "crs": f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else grid.crs.to_wkt(),
                "width_px": grid.width,
                "height_px": grid.height,
                "gsd_m": grid.gsd_m,
                "bounds": list(grid.bounds),
            },
            "area": area.describe() if area else None,
            "cover_height_m": self.options.cover_m,
            "block_m": self.blocks.side_px * grid.gsd_m,
            "canopy_version": __version__,
        }
        legend = CLASSES if self.dates else COVER_CLASSES
        found = Comparison(self.mode, facts, self.sums, self.blocks, self.preview, notes=list(self.notes))
        found.classes_ha = {legend[code]: m2 / 1e4 for code, m2 in self.classes_m2.items()}
        if self.dates:
            blind = self.blind_m2 / self.canopy_m2 if self.canopy_m2 else 0.0
            found.rule = {
                "confidence": self.options.confidence,
                "error_a": self.errors[0].source,
                "error_b": self.errors[1].source,
                "expected_false_share": 1 - self.options.confidence,
                "undetectable_canopy_share": blind,
            }
            if blind > _BLIND_SHARE:
                found.notes.append(
                    f"in {blind:.0%} of A's canopy not even the loss of all of it would be significant: the "
                    "maps' errors are too wide for single pixels. Errors that both share (one model, one "
                    "place) cancel: if you know what is left, give --sigma-a and --sigma-b"
                )
            found.notes += [
                f"the error of {side} is {error.source}"
                for side, error in zip("AB", self.errors, strict=True)
                if error.source.startswith("ASSUMED")
            ]
        return found


def _side_facts(product: HeightProduct) -> dict[str, Any]:
    crs = product.crs
    return {
        "name": product.name,
        "kind": product.kind,
        "files": len(product.tiles),
        "crs": f"EPSG:{crs.epsg}" if crs.epsg else crs.to_wkt(),
        "gsd_m": product.gsd_m,
        "step_m": product.step_m,
        "dates": dates_text(product.dates),
        "model": product.tags.get("CANOPY_MODEL"),
        "interval_level": product.level,
    }


@contextlib.contextmanager
def staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` whose files move into it at the end, or vanish on an error.

    Raises InputError when `out` is a file, holds anything and `overwrite` is not set, or has no parent
    folder.
    """
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise InputError("a file", where=out, expected="a folder for the results")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(
            "the folder has files already", where=out, remedy="add --overwrite, or name another with -o"
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError("no such folder", where=parent, remedy="create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError("the folder cannot be written to", where=parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
    try:
        with told_as_output(out):
            yield folder
            out.mkdir(exist_ok=True)
            for path in sorted(folder.iterdir()):
                os.replace(path, out / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finite(value: float | None) -> float | None:
    """None for NaN and infinity: JSON has neither."""
    return None if value is None or not math.isfinite(value) else float(value)


# A block with fewer valid pixels than this share of a full one ranks nowhere: its mean says little.
RANKED_SHARE = 0.25
SHOWN_BLOCKS = 10
_LABELS = {
    "n": "pixels valid in both",
    "area_ha": "their ground area (ha)",
    "mean_a_m": "mean height, A (m)",
    "mean_b_m": "mean height, B (m)",
    "mean_difference_m": "mean of B - A (m)",
    "mean_absolute_difference_m": "mean absolute difference (m)",
    "rms_difference_m": "root mean square difference (m)",
    "r": "correlation",
    "p05_difference_m": "5th percentile of B - A (m)",
    "p50_difference_m": "median of B - A (m)",
    "p95_difference_m": "95th percentile of B - A (m)",
    "within_1m": "within 1 m of each other",
    "within_2m": "within 2 m of each other",
    "within_5m": "within 5 m of each other",
}


def write_files(found: Comparison, folder: Path, page: bool = True) -> None:
    """Write the tables, the JSON and (if wanted) the page of a comparison into `folder`."""
    plain = found.to_dict()
    write_json(folder / "compare.json", plain)
    write_csv(folder / "summary.csv", [{"quantity": k, "value": v} for k, v in plain["overall"].items()])
    write_csv(folder / "cover.csv", plain["cover"])
    write_csv(folder / "by_height.csv", plain["by_height"])
    if found.mode == "dates":
        write_csv(folder / "change.csv", [{"class": k, "ha": v} for k, v in found.classes_ha.items()])
    blocks = block_rows(found)
    write_csv(folder / "blocks.csv", blocks)
    if page:
        (folder / "report.html").write_text(report(found, blocks), encoding="utf-8")


def write_json(path: Path, plain: Mapping[str, Any]) -> None:
    """Indented JSON; NaN is refused rather than written."""
    path.write_text(json.dumps(plain, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one kind with a header; None is empty, numbers have nine digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if not rows:
            return
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def block_rows(found: Comparison) -> list[dict[str, Any]]:
    """One row per block with valid pixels, in reading order; hectares of every class where dates are
    compared.
    """
    blocks = found.blocks
    grid = blocks.block_grid()
    lon, lat = blocks.centres_lonlat()
    means = {name: blocks.mean(name) for name in ("a", "b", "abs")}
    rows = []
    for row, col in zip(*np.nonzero(blocks.count), strict=True):
        at = row, col
        west, north = grid.xy(row, col)
        east, south = grid.xy(row + 1, col + 1)
        plain: dict[str, Any] = {
            "lon": round(float(lon[at]), 7), "lat": round(float(lat[at]), 7),
            "west": west, "south": south, "east": east, "north": north,
            "n": int(blocks.count[at]), "area_ha": float(blocks.sums["area"][at]) / 1e4,
            "mean_a_m": float(means["a"][at]), "mean_b_m": float(means["b"][at]),
            "mean_difference_m": float(means["b"][at] - means["a"][at]),
            "mean_absolute_difference_m": float(means["abs"][at]),
        }  # fmt: skip
        legend = CLASSES if found.mode == "dates" else COVER_CLASSES
        for code, name in legend.items():
            plain[f"{name.replace(' ', '_').lower()}_ha"] = float(blocks.sums[f"class_{code}"][at]) / 1e4
        rows.append(plain)
    return rows


def class_picture(found: Comparison) -> np.ndarray:
    """The most frequent class of each preview pixel, 0 where unknown, uint8 (h, w)."""
    legend = CLASSES if found.mode == "dates" else COVER_CLASSES
    stack = np.stack([found.preview.sums[f"class_{code}"] for code in legend])
    codes = np.array(list(legend))[stack.argmax(axis=0)]
    return np.where(found.preview.count > 0, codes, 0).astype(np.uint8)


def report(found: Comparison, blocks: Sequence[Mapping[str, Any]]) -> str:
    """The page, as HTML."""
    a, b = (found.facts[side]["name"] for side in "ab")
    dates = found.mode == "dates"
    kind = "Canopy change" if dates else "Agreement of two canopy height maps"
    page = Page(kind, _lead(found))
    page.notes(found.notes)
    page.heading("In short")
    overall = found.sums.overall()
    rows = [(_LABELS[k], f"{v:.1%}" if k.startswith("within") else v) for k, v in overall.items()]
    page.table(["quantity", "value"], rows, caption=f"A = {a}; B = {b}. Differences are B - A.")
    if dates:
        _change_section(page, found)
    _cover_section(page, found)
    _pictures(page, found)
    page.heading("By height")
    heights = [
        {
            "name": f"{r['low_m']:g}+" if r["high_m"] is None else f"{r['low_m']:g}-{r['high_m']:g}",
            "n": r["n"],
            "bias": (r["mean_difference_m"], None, None),
            "mae": (r["mean_absolute_difference_m"], None, None),
        }
        for r in found.sums.height_rows()
    ]
    page.figure(
        figures.error_by_height(
            heights, "mean height of both maps (m)", ("mean of B - A", "mean |B - A|"), "difference (m)"
        ),
        "Mean and mean absolute difference by the mean height of both maps, over the share of "
        "pixels. Neither map is taken for the truth.",
        "Differences by height class",
    )
    _block_section(page, found, blocks)
    page.heading("Provenance")
    page.facts(found.facts)
    return page.html()


def _lead(found: Comparison) -> str:
    grid, facts = found.facts["grid"], found.facts
    sides = (
        f"{s.upper()}: {facts[s]['name']} ({facts[s]['kind']}, imagery {facts[s]['dates']})" for s in "ab"
    )
    size = (
        f"{grid['width_px']} x {grid['height_px']} px of {number_text(grid['gsd_m'])} m, {grid['crs'][:40]}"
    )
    return f"{'; '.join(sides)}. Compared on {size}."


def _change_section(page: Page, found: Comparison) -> None:
    page.heading("Change")
    total = sum(found.classes_ha.values())
    rows = [(name, ha, f"{ha / total:.2%}") for name, ha in found.classes_ha.items()]
    page.table(["class", "ha", "share"], rows)
    rule = found.rule
    page.text(
        f"A pixel counts as changed where the {rule['confidence']:.0%} interval of B - A leaves out 0. "
        f"Error of A: {rule['error_a']}. Error of B: {rule['error_b']}. Of ground without any change about "
        f"{rule['expected_false_share']:.0%} would still be called changed. Canopy is what is higher than "
        f"{found.facts['cover_height_m']:g} m; gained and lost are significant changes across that height."
    )


def _cover_section(page: Page, found: Comparison) -> None:
    page.heading("Cover")
    rows = [
        (
            f"above {r['above_m']:g} m", f"{r['cover_a']:.1%}", f"{r['cover_b']:.1%}",
            r["only_a_ha"], r["only_b_ha"],
            f"{r['agree']:.1%}", r["iou"],
        )
        for r in found.sums.cover_rows()
    ]  # fmt: skip
    page.table(
        [
            "canopy",
            "cover in A",
            "cover in B",
            "only A (ha)",
            "only B (ha)",
            "ground that agrees",
            "overlap (IoU)",
        ],
        rows,
    )


def _pictures(page: Page, found: Comparison) -> None:
    preview, dates = found.preview, found.mode == "dates"
    a, b = preview.mean("a"), preview.mean("b")
    metres = found.facts["grid"]["gsd_m"] * preview.side_px
    page.heading("Where")
    page.figure(
        figures.side_by_side(a, b, ("A", "B"), metres),
        "Both maps with one colour scale; grey is missing in either.",
        "The two maps beside each other",
    )  # fmt: skip
    label = "change in height, B - A (m)" if dates else "B - A (m)"
    page.figure(
        figures.difference_map(b - a, label, metres),
        "Orange: B is higher. Purple: B is lower.",
        "Map of the differences",
    )
    legend = CLASSES if dates else COVER_CLASSES
    caption = "Significant changes." if dates else f"Canopy above {found.facts['cover_height_m']:g} m."
    if preview.side_px > 1:
        side = preview.side_px
        caption += f" Each picture pixel shows the most frequent class of {side} x {side} map pixels."
    page.figure(figures.class_map(class_picture(found), legend, metres), caption, "Map of the classes")
    edges = np.arange(found.sums.joint.shape[0] + 1.0)
    page.figure(
        figures.density(found.sums.joint, edges, "height in A (m)", "height in B (m)"),
        "How often which pair of heights occurs.", "Density of the heights of A and B",
    )  # fmt: skip


def _block_section(page: Page, found: Comparison, blocks: Sequence[Mapping[str, Any]]) -> None:
    full = found.blocks.side_px**2
    ranked = [row for row in blocks if row["n"] >= RANKED_SHARE * full] or list(blocks)
    side = number_text(found.facts["block_m"])
    page.heading(f"Blocks of {side} m")
    names = ["lon", "lat", "n", "mean_a_m", "mean_b_m", "mean_difference_m", "mean_absolute_difference_m"]
    headers = ["longitude", "latitude", "pixels", "A (m)", "B (m)", "B - A (m)", "mean |B - A| (m)"]
    for title, sign in (("B higher than A", -1), ("B lower than A", 1)):
        order = sorted(ranked, key=lambda row, sign=sign: sign * row["mean_difference_m"])[:SHOWN_BLOCKS]  # type: ignore[misc]
        order = [row for row in order if row["mean_difference_m"] * sign < 0]
        rows = [[f"{r[k]:.5f}" if k in ("lon", "lat") else r[k] for k in names] for r in order]
        if rows:
            page.table(
                headers, rows, caption=f"{title}: the largest differences. All blocks are in blocks.csv."
            )
