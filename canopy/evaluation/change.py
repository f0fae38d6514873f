"""`canopy compare`: two height maps of one place, as two products or as two dates.

Two products: sums that are filled window by window tell how far they agree. Two dates: whether a pixel has
changed is told from the difference of two uncertain heights. With B - A the change, its interval is recovered
from each map's own interval (the MOVER method; Zou and Donner, Statistics in Medicine 27, 2008, 1693-1702,
doi 10.1002/sim.3095), which needs no symmetry of either:

    lower = (b - a) - sqrt((b - l_b)^2 + (u_a - a)^2)
    upper = (b - a) + sqrt((u_b - b)^2 + (a - l_a)^2)

The change is significant where that interval does not hold 0. Both maps' errors count as independent; errors
that two dates of one model share cancel, so for them the rule errs towards "no change".
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from canopy import __version__
from canopy.config import Settings, validate_settings
from canopy.errors import ConfigError, InputError
from canopy.evaluation.grids import BlockSums, common_grid, pixel_areas_m2, read_on
from canopy.evaluation.maps import HeightMap, HeightWindow, dates_text, open_heights, years_apart
from canopy.evaluation.report import write_comparison
from canopy.files import check_output, told_as_output
from canopy.geo.area import AOI
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid, tiles_over
from canopy.metrics import HEIGHT_BINS_M, height_bin
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import pandas
    import xarray

    from canopy.evaluation.maps import HeightSource

TILE_PX = 1024
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
    """Distances (down, up) from a height to the ends of its interval of z standard deviations, (h, w)."""
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
    """Change b - a and the ends (lower, upper) of its interval of z standard deviations, metres (h, w)."""
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
# Of the canopy of A: beyond this share "no significant change" says more of the errors than of the trees.
_BLIND_SHARE = 0.1


class CompareOptions(Settings):
    """What `canopy compare` can be asked.

    Attributes:
        mode: "products", "dates" (A is the earlier one) or "auto".
        gsd: ground metres per pixel of the common grid; None: the coarser map's own pixels.
        cover_m: canopy is what is higher.
        block_m: side of the blocks of the table, ground metres.
        confidence: of a change (dates).
        sigma_a, sigma_b: standard deviation of each map's pixel in metres (dates).
        nodata_a, nodata_b: values that mean missing, in place of what the files say.
        band_a, band_b: number or name of each height's band.
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
    band_a: int | str | None = None
    band_b: int | str | None = None
    report: bool = True

    def check(self) -> CompareOptions:
        """The options, or InputError for a value out of range."""
        if self.mode not in MODES:
            raise ConfigError(f"{self.mode!r}", where="--as", expected=", ".join(MODES))
        for name, value, top in (("--cover-height", self.cover_m, 50), ("--block-m", self.block_m, 1e5)):
            if not 0 < value <= top:
                raise ConfigError(f"{value:g} m", where=name, expected=f"above 0, up to {top:g}")
        z_of(self.confidence)
        return self


@dataclass(eq=False)
class Comparison:
    """What was found; `to_dict` is compare.json.

    Attributes:
        mode: "products" or "dates". legend: names of the classes by code.
        facts: both maps, the grid, the area. sums: over all pixels. rule: how a change was told (dates).
        blocks, preview: sums over squares, for the table and the pictures.
        classes_ha: ground of each class.
        maps: without an output folder, the maps that would lie in it, as DataArrays by name.
    """

    mode: str
    legend: Mapping[int, str]
    facts: dict[str, Any]
    sums: PairSums
    blocks: BlockSums
    preview: BlockSums
    classes_ha: dict[str, float] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    maps: dict[str, xarray.DataArray] = field(default_factory=dict)

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

    def block_table(self) -> pandas.DataFrame:
        """One row per block with valid pixels, in reading order, with the hectares of every class."""
        import pandas

        blocks, grid = self.blocks, self.blocks.block_grid()
        row, col = np.nonzero(blocks.count)
        t = grid.transform
        west, north = t.c + t.a * col, t.f + t.e * row
        lon, lat = transformer(grid.crs, "EPSG:4326").transform(west + t.a / 2, north + t.e / 2)
        mean = {name: blocks.mean(name)[row, col] for name in ("a", "b", "abs")}
        columns = {
            "lon": np.round(lon, 7), "lat": np.round(lat, 7),
            "west": west, "south": north + t.e, "east": west + t.a, "north": north,
            "n": blocks.count[row, col].astype(np.int64), "area_ha": blocks.sums["area"][row, col] / 1e4,
            "mean_a_m": mean["a"], "mean_b_m": mean["b"], "mean_difference_m": mean["b"] - mean["a"],
            "mean_absolute_difference_m": mean["abs"],
        }  # fmt: skip
        for code, name in self.legend.items():
            columns[f"{name.replace(' ', '_').lower()}_ha"] = blocks.sums[f"class_{code}"][row, col] / 1e4
        return pandas.DataFrame(columns)


def compare(
    a: HeightSource,
    b: HeightSource,
    out: str | Path | None = None,
    *,
    area: AOI | None = None,
    overwrite: bool = False,
    inputs: Sequence[Any] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Compare two height maps: paths, folders of tiles, or xarray DataArrays with a CRS.

    Differences are B - A. Products: difference.tif, cover.tif. Dates: change.tif (change and its interval),
    classes.tif. Both: compare.json, summary.csv, cover.csv, by_height.csv, blocks.csv, report.html.

    Args:
        out: folder to write; None writes nothing, and the maps are in the result's `maps`.
        area: limits the comparison. inputs: what else was read, which must not be written over.
        options: see `CompareOptions`.

    Raises InputError for maps that cannot be read or do not meet, impossible options, or existing outputs
    without `overwrite`; nothing is written then.
    """
    chosen = validate_settings(CompareOptions, options, "compare").check()
    if out is not None:
        expected = "a directory for the results"
        check_output(out, [a, b, *inputs], overwrite=overwrite, folder=True, expected=expected)
    with (
        open_heights(a, nodata=chosen.nodata_a, band=chosen.band_a) as one,
        open_heights(b, nodata=chosen.nodata_b, band=chosen.band_b) as two,
    ):
        mode, why = choose_mode(one, two, chosen.mode)
        run = _Run(one, two, common_grid(one, two, area, chosen.gsd), mode, chosen)
        if out is None:
            sinks = tuple(_ArraySink(run.grid, layer.bands) for layer in run.layers)
            found = run.walk(sinks, area, progress)
            found.maps = {
                layer.name: sink.array(layer.name) for layer, sink in zip(run.layers, sinks, strict=True)
            }
            found.facts["mode_because"] = why
            return found
        with _staging(Path(out).expanduser()) as folder:
            with contextlib.ExitStack() as stack:
                writers = tuple(stack.enter_context(run.writer(folder, layer)) for layer in run.layers)
                found = run.walk(writers, area, progress)
            found.facts["mode_because"] = why
            write_comparison(found, folder, chosen.report)
    return found


def choose_mode(a: HeightMap, b: HeightMap, asked: str) -> tuple[str, str]:
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


@dataclass(frozen=True)
class _Layer:
    """A map that is written: `classes` is its legend, None for metres."""

    name: str
    bands: tuple[str, ...]
    classes: Mapping[int, str] | None = None


class _Sink(Protocol):
    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int = 0, col_off: int = 0) -> None: ...


class _ArraySink:
    """Keeps a map in memory, NaN where missing."""

    def __init__(self, grid: Grid, bands: Sequence[str]) -> None:
        self.grid, self.bands = grid, list(bands)
        self.values = np.full((len(bands), *grid.shape), np.nan, np.float32)

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int = 0, col_off: int = 0) -> None:
        """Take a window (bands, h, w)."""
        here = np.s_[:, row_off : row_off + valid.shape[0], col_off : col_off + valid.shape[1]]
        self.values[here] = np.where(valid, values, np.nan)

    def array(self, name: str) -> xarray.DataArray:
        """With dimensions (y, x), or (band, y, x) if there are several, and its CRS."""
        import rioxarray  # noqa: F401  (registers the .rio accessor)
        import xarray

        t = self.grid.transform
        coords = {
            "band": self.bands,
            "y": t.f + t.e * (np.arange(self.grid.height) + 0.5),
            "x": t.c + t.a * (np.arange(self.grid.width) + 0.5),
        }
        made = xarray.DataArray(self.values, dims=("band", "y", "x"), coords=coords, name=name)
        made = made if len(self.bands) > 1 else made[0].drop_vars("band")
        return made.rio.write_crs(self.grid.crs.to_wkt()).rio.write_transform(t).rio.write_nodata(np.nan)


class _Run:
    """One walk over the common grid."""

    def __init__(self, a: HeightMap, b: HeightMap, grid: Grid, mode: str, options: CompareOptions) -> None:
        self.a, self.b, self.grid, self.options, self.mode = a, b, grid, options, mode
        self.dates = mode == "dates"
        self.legend = CLASSES if self.dates else COVER_CLASSES
        first = ("change", "change_lower", "change_upper") if self.dates else ("difference",)
        second = "classes" if self.dates else "cover"
        self.layers = _Layer(first[0], first), _Layer(second, ("class",), self.legend)
        classes = [f"class_{code}" for code in self.legend]
        self.classes_m2 = dict.fromkeys(self.legend, 0.0)
        side_px = max(1, round(options.block_m / grid.gsd_m))
        self.blocks = BlockSums(grid, side_px, ["a", "b", "abs", "area", *classes])
        self.preview = BlockSums.picture(grid, ["a", "b", *classes])
        self.sums = PairSums(sorted({2.0, 5.0, 10.0, float(options.cover_m)}))
        self.canopy_m2 = self.blind_m2 = 0.0
        if self.dates:
            self.z = z_of(options.confidence)
            self.errors = (
                choose_error("a", options.sigma_a, a.level, a.step_m),
                choose_error("b", options.sigma_b, b.level, b.step_m),
            )

    def writer(self, folder: Path, layer: _Layer) -> CogWriter:
        """The file of one layer."""
        tags = {
            "CANOPY_VERSION": __version__, "CANOPY_COMPARED_A": self.a.name, "CANOPY_COMPARED_B": self.b.name,
        }  # fmt: skip
        path = folder / f"{layer.name}.tif"
        if layer.classes is None:
            return CogWriter(path, self.grid, [BandSpec(name) for name in layer.bands], tags=tags)
        tags["CANOPY_CLASSES"] = "; ".join(f"{code} {name}" for code, name in layer.classes.items())
        bands = [BandSpec("class", "1")]
        return CogWriter(path, self.grid, bands, tags=tags, encoding="uint8m", overviews="mode")

    def walk(self, sinks: Sequence[_Sink], area: AOI | None, progress: Progress | None) -> Comparison:
        """Read both maps in windows of about 1000 px: memory does not depend on their size."""
        progress = progress or NoProgress()
        tiles = tiles_over(self.grid, TILE_PX)
        progress.start(len(tiles), "comparing")
        # Of the whole grid, so that a pixel's area does not depend on the window it is met in.
        row_areas = pixel_areas_m2(self.grid)
        for tile in tiles:
            row, col = self.grid.offset_of(tile)
            a, b = (read_on(side, tile, interval=self.dates) for side in (self.a, self.b))
            valid = a.valid & b.valid
            if area is not None and not area.is_box:
                valid &= area.mask(tile)
            ground = np.broadcast_to(row_areas[row : row + tile.height, None], valid.shape)
            stored, codes = self._changed(a, b, valid, ground) if self.dates else self._differs(a, b)
            sinks[0].write(stored.astype(np.float32), valid, row, col)
            sinks[1].write(codes[None].astype(np.float32), valid, row, col)
            self._count((row, col), a.height_m, b.height_m, valid, ground, codes)
            progress.advance()
        if self.sums.n == 0:
            raise InputError(
                "no pixel is valid in both maps", where=f"{self.a.name}, {self.b.name}",
                remedy="check their nodata rules (--nodata-a, --nodata-b)",
            )  # fmt: skip
        return self._comparison(area)

    def _differs(self, a: HeightWindow, b: HeightWindow) -> tuple[np.ndarray, np.ndarray]:
        tall = (a.height_m > self.options.cover_m, b.height_m > self.options.cover_m)
        return (b.height_m - a.height_m)[None], 1 + tall[0] + 2 * tall[1].astype(np.uint8)

    def _changed(
        self, a: HeightWindow, b: HeightWindow, valid: np.ndarray, ground: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        change, lower, upper = difference_interval(a, b, self.errors, self.z)
        codes = classify(a.height_m, b.height_m, lower, upper, self.options.cover_m)
        canopy = valid & (a.height_m > self.options.cover_m)
        self.canopy_m2 += float(ground[canopy].sum())
        # Were it to fall to the ground, its change would be minus its height: would the interval hold 0?
        self.blind_m2 += float(ground[canopy & (a.height_m <= upper - change)].sum())
        return np.stack([change, lower, upper]), codes

    def _count(
        self, at: tuple[int, int], a: np.ndarray, b: np.ndarray, valid: np.ndarray, ground: np.ndarray,
        codes: np.ndarray,
    ) -> None:  # fmt: skip
        self.sums.add(a[valid], b[valid], ground[valid])
        members = {f"class_{code}": codes == code for code in self.legend}
        for code in self.legend:
            self.classes_m2[code] += float(ground[valid & members[f"class_{code}"]].sum())
        self.preview.add(*at, valid, {"a": a, "b": b, **members})
        by_area = {name: np.where(member, ground, 0) for name, member in members.items()}
        self.blocks.add(*at, valid, {"a": a, "b": b, "abs": np.abs(b - a), "area": ground, **by_area})

    def _comparison(self, area: AOI | None) -> Comparison:
        grid = self.grid
        facts = {
            "a": _side_facts(self.a),
            "b": _side_facts(self.b),
            "years_apart": years_apart(self.a.dates, self.b.dates),
            "grid": {
                "crs": _crs_text(grid.crs),
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
        classes_ha = {self.legend[code]: m2 / 1e4 for code, m2 in self.classes_m2.items()}
        notes = [*self.a.notes, *self.b.notes]
        if self.dates:
            notes += self._change_notes()
        return Comparison(
            self.mode, self.legend, facts, self.sums, self.blocks, self.preview, classes_ha,
            self._rule() if self.dates else {}, notes,
        )  # fmt: skip

    def _rule(self) -> dict[str, Any]:
        return {
            "confidence": self.options.confidence,
            "error_a": self.errors[0].source,
            "error_b": self.errors[1].source,
            "expected_false_share": 1 - self.options.confidence,
            "undetectable_canopy_share": self.blind_m2 / self.canopy_m2 if self.canopy_m2 else 0.0,
        }

    def _change_notes(self) -> Iterator[str]:
        blind = self._rule()["undetectable_canopy_share"]
        if blind > _BLIND_SHARE:
            yield (
                f"in {blind:.0%} of A's canopy not even the loss of all of it would be significant: the "
                "maps' errors are too wide for single pixels. Errors that both share (one model, one "
                "place) cancel: if you know what is left, give --sigma-a and --sigma-b"
            )
        for side, error in zip("AB", self.errors, strict=True):
            if error.source.startswith("ASSUMED"):
                yield f"the error of {side} is {error.source}"


def _crs_text(crs: Any) -> str:
    return f"EPSG:{crs.epsg}" if crs.epsg else str(crs.to_wkt())


def _side_facts(heights: HeightMap) -> dict[str, Any]:
    return {
        "name": heights.name,
        "kind": heights.kind,
        "files": len(heights.tiles),
        "crs": _crs_text(heights.crs),
        "gsd_m": heights.gsd_m,
        "step_m": heights.step_m,
        "dates": dates_text(heights.dates),
        "model": heights.tags.get("CANOPY_MODEL"),
        "interval_level": heights.level,
    }


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` whose files move into it at the end, or vanish on an error."""
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError("no such directory", where=parent, remedy="create it first")
    with told_as_output(out):
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
        try:
            yield folder
            out.mkdir(exist_ok=True)
            for path in sorted(folder.iterdir()):
                os.replace(path, out / path.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
