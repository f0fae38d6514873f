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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy import __version__, metrics
from canopy.config import Settings, validate_settings
from canopy.errors import ConfigError, InputError
from canopy.evaluation.grids import BlockSums, common_grid, pixel_areas_m2, read_on
from canopy.evaluation.maps import HeightMap, open_heights, years_apart
from canopy.evaluation.report import write_comparison
from canopy.evaluation.scores import without_nan
from canopy.files import check_output, told_as_output
from canopy.geo.area import AOI
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid, tiles_over
from canopy.metrics import COLUMN, FIELDS, HEIGHT_BINS_M, N_BINS, height_bin
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import pandas
    import xarray

    from canopy.evaluation.maps import HeightSource

TILE_PX = 1024
MODES = ("auto", "products", "dates")
# Two maps of one model whose imagery is this far apart are two dates, not two products.
DATES_APART_YEARS = 0.5
# Where nothing else is known: about the RMSE of the best published models on lidar (Open-Canopy: 4.02 m).
ASSUMED_SIGMA_M = 4.0
# Of the canopy of A: beyond this share "no significant change" says more of the errors than of the trees.
_BLIND_SHARE = 0.1
NO_CHANGE, GAIN, LOSS, CANOPY_GAIN, CANOPY_LOSS = 1, 2, 3, 4, 5
CHANGE_CLASSES = {
    NO_CHANGE: "no significant change",
    GAIN: "taller",
    LOSS: "lower",
    CANOPY_GAIN: "canopy gained",
    CANOPY_LOSS: "canopy lost",
}
COVER_CLASSES = {1: "open in both", 2: "canopy in A only", 3: "canopy in B only", 4: "canopy in both"}


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


# ---- whether a pixel has changed ------------------------------------------------------------------
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
            expected = "metres, above 0 and below 100"
            raise InputError(f"{sigma_m:g} m", where=f"--sigma-{side}", expected=expected)
        return MapError(sigma_m, None, step_m, f"--sigma-{side} {sigma_m:g} m")
    if level is not None:
        return MapError(None, level, step_m, f"its own {level:.0%} interval bands")
    return MapError(
        ASSUMED_SIGMA_M, None, step_m,
        f"ASSUMED: {ASSUMED_SIGMA_M:g} m, about the RMSE of the best published models; give --sigma-{side}",
    )  # fmt: skip


def half_widths(heights: np.ndarray, error: MapError, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances (down, up) from a height to the ends of its interval of z standard deviations, (h, w).

    `heights`: metres (1, h, w), or (3, h, w) with the ends of the map's own interval.
    """
    rounding = error.step_m**2 / 12 * z**2
    if error.level is None:
        width = np.full(heights.shape[1:], np.sqrt((z * (error.sigma_m or 0)) ** 2 + rounding))
        return width, width
    factor = z / NormalDist().inv_cdf((1 + error.level) / 2)
    # A calibrated interval may leave its own height outside by rounding; a width is never negative.
    down, up = factor * np.maximum([heights[0] - heights[1], heights[2] - heights[0]], 0)
    return np.sqrt(down**2 + rounding), np.sqrt(up**2 + rounding)


def difference_interval(
    a: np.ndarray, b: np.ndarray, errors: tuple[MapError, MapError], z: float
) -> np.ndarray:
    """Change b - a and the ends (lower, upper) of its interval of z standard deviations, metres (3, h, w)."""
    change = b[0] - a[0]
    a_down, a_up = half_widths(a, errors[0], z)
    b_down, b_up = half_widths(b, errors[1], z)
    return np.stack([change, change - np.hypot(b_down, a_up), change + np.hypot(b_up, a_down)])


def classify(
    a: np.ndarray, b: np.ndarray, lower: np.ndarray, upper: np.ndarray, cover_m: float
) -> np.ndarray:
    """Classes (see `CHANGE_CLASSES`) uint8 (h, w): significant changes; canopy is height > `cover_m`."""
    up, down = lower > 0, upper < 0
    before, after = a > cover_m, b > cover_m
    return np.select(
        [up & ~before & after, down & before & ~after, up, down],
        [CANOPY_GAIN, CANOPY_LOSS, GAIN, LOSS], NO_CHANGE,
    ).astype(np.uint8)  # fmt: skip


def z_of(confidence: float) -> float:
    """Two-sided normal quantile of a confidence. Raises InputError outside 0.5 to 0.9999."""
    if not 0.5 <= confidence <= 0.9999:
        raise InputError(f"{confidence:g}", where="--confidence", expected="0.5 to 0.9999")
    return NormalDist().inv_cdf((1 + confidence) / 2)


# ---- how far two maps agree -----------------------------------------------------------------------
WITHIN_M = (1.0, 2.0, 5.0)
JOINT_TOP_M = 80
# Percentiles of differences are read off a histogram of this step: exact to half of it.
STEP_M = 0.05
SPAN_M = 120.0
QUANTILES = (0.05, 0.5, 0.95)


class PairSums:
    """Everything that is summed over the pixels valid in both maps. Differences are B - A.

    `rows` are sums of `canopy.metrics` (B the map, A the reference) by the mean height of both: neither side
    is taken for the truth. `cover[i]` holds the ground areas (A open/canopy, B open/canopy) at
    `thresholds[i]`, square metres.
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self.rows = np.zeros((N_BINS, len(FIELDS)))
        self.within = np.zeros(len(WITHIN_M))
        self.differences = np.zeros(round(2 * SPAN_M / STEP_M), np.int64)
        self.joint = np.zeros((JOINT_TOP_M, JOINT_TOP_M), np.int64)
        self.cover = np.zeros((len(thresholds), 2, 2))

    @property
    def n(self) -> int:
        """Pixels."""
        return int(self.rows[:, COLUMN["n"]].sum())

    def add(self, a: np.ndarray, b: np.ndarray, area: np.ndarray) -> None:
        """Add pixels: heights of both maps (n,) in metres and their ground area (n,) in square metres."""
        self.rows += metrics.pixel_sums(b, a, height_bin((a + b) / 2), N_BINS)
        self.within += [np.count_nonzero(np.abs(b - a) <= limit) for limit in WITHIN_M]
        steps = np.clip(((b - a + SPAN_M) / STEP_M).astype(np.int64), 0, self.differences.size - 1)
        self.differences += np.bincount(steps, minlength=self.differences.size)
        i, j = (np.clip(x, 0, JOINT_TOP_M - 1).astype(np.int64) for x in (a, b))
        self.joint += np.bincount(i * JOINT_TOP_M + j, minlength=JOINT_TOP_M**2).reshape(self.joint.shape)
        for k, threshold in enumerate(self.thresholds):
            state = (a > threshold) * 2 + (b > threshold)
            self.cover[k] += np.bincount(state, weights=area, minlength=4).reshape(2, 2)

    def overall(self) -> dict[str, Any]:
        """n, area, means, mean difference, MAE, RMSE, r, percentiles, shares within 1, 2, 5 m."""
        total, n = self.rows.sum(axis=0), self.n
        scores = metrics.scores(total)
        cumulated = np.cumsum(self.differences)
        at = np.searchsorted(cumulated, np.multiply(QUANTILES, n), side="left")
        quantiles = ((at + 0.5) * STEP_M - SPAN_M).round(6)
        return without_nan({
            "n": n,
            "area_ha": self.cover[0].sum() / 1e4,
            "mean_a_m": total[COLUMN["r"]] / n,
            "mean_b_m": total[COLUMN["p"]] / n,
            "mean_difference_m": scores["bias_m"].item(),
            "mean_absolute_difference_m": scores["mae_m"].item(),
            "rms_difference_m": scores["rmse_m"].item(),
            "r": scores["r"].item(),
            **{f"p{100 * q:02.0f}_difference_m": v for q, v in zip(QUANTILES, quantiles, strict=True)},
            **{f"within_{limit:g}m": s / n for limit, s in zip(WITHIN_M, self.within, strict=True)},
        })  # fmt: skip

    def cover_rows(self) -> list[dict[str, Any]]:
        """Per threshold: hectares of each combination, share of ground that agrees, and the overlap (IoU)."""
        rows = []
        for threshold, cover in zip(self.thresholds, self.cover.tolist(), strict=True):
            (neither, only_b), (only_a, both) = cover
            total, union = neither + only_b + only_a + both, only_a + only_b + both
            rows.append({
                "above_m": threshold,
                "both_ha": both / 1e4,
                "only_a_ha": only_a / 1e4,
                "only_b_ha": only_b / 1e4,
                "neither_ha": neither / 1e4,
                "cover_a": (only_a + both) / total,
                "cover_b": (only_b + both) / total,
                "agree": (neither + both) / total,
                "iou": both / union if union > 0 else None,
            })  # fmt: skip
        return rows

    def height_rows(self) -> list[dict[str, Any]]:
        """Differences by the mean height of both maps."""
        scores = metrics.scores(self.rows)
        columns = ("bias_m", "mae_m", "rmse_m")
        names = ("mean_difference_m", "mean_absolute_difference_m", "rms_difference_m")
        return [
            {
                "low_m": low, "high_m": high, "n": int(scores["n"][k]),
                **{name: without_nan(scores[c][k]) for name, c in zip(names, columns, strict=True)},
            }
            for k, (low, high) in enumerate(zip(HEIGHT_BINS_M, [*HEIGHT_BINS_M[1:], None], strict=True))
        ]  # fmt: skip


@dataclass(eq=False)
class Comparison:
    """What was found; `to_dict` is compare.json.

    Attributes:
        mode: "products" or "dates". legend: names of the classes by code.
        facts: both maps, the grid, the area. sums: over all pixels. rule: how a change was told (dates).
        blocks, preview: sums over squares, for the table and the pictures.
        maps: without an output folder, the maps that would lie in it, as DataArrays by name.
    """

    mode: str
    legend: Mapping[int, str]
    facts: dict[str, Any]
    sums: PairSums
    blocks: BlockSums
    preview: BlockSums
    rule: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    maps: dict[str, xarray.DataArray] = field(default_factory=dict)

    @property
    def classes_ha(self) -> dict[str, float]:
        """Ground of each class."""
        return {name: float(self.blocks.sums[name].sum()) / 1e4 for name in self.legend.values()}

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
        for name in self.legend.values():
            columns[f"{name.replace(' ', '_').lower()}_ha"] = blocks.sums[name][row, col] / 1e4
        return pandas.DataFrame(columns)


# ---- canopy compare -------------------------------------------------------------------------------
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
        grid = common_grid(one, two, area, chosen.gsd)
        if mode == "dates":
            layers = {"change": ("change", "change_lower", "change_upper"), "classes": ("class",)}
        else:
            layers = {"difference": ("difference",), "cover": ("class",)}
        if out is None:
            arrays = {name: _ArraySink(grid, bands) for name, bands in layers.items()}
            found = _walk(one, two, grid, mode, why, chosen, list(arrays.values()), area, progress)
            found.maps = {name: sink.array(name) for name, sink in arrays.items()}
            return found
        with _staging(Path(out).expanduser()) as folder:
            with contextlib.ExitStack() as stack:
                tags = {
                    "CANOPY_VERSION": __version__,
                    "CANOPY_COMPARED_A": one.name,
                    "CANOPY_COMPARED_B": two.name,
                }
                writers = [
                    stack.enter_context(_writer(folder / f"{name}.tif", grid, bands, tags, mode))
                    for name, bands in layers.items()
                ]
                found = _walk(one, two, grid, mode, why, chosen, writers, area, progress)
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
                f"A is of {'/'.join(a.dates)}, B of {'/'.join(b.dates)}", where=f"{a.name}, {b.name}",
                expected="the earlier map first", remedy="swap them, or add --as products",
            )  # fmt: skip
        return "dates", "one product, imagery of different dates"
    return "products", "not known to be two dates of one product; --as dates compares them as such"


class _ArraySink:
    """Keeps a map in memory, NaN where missing."""

    def __init__(self, grid: Grid, bands: Sequence[str]) -> None:
        self.grid, self.bands = grid, list(bands)
        self.values = np.full((len(bands), *grid.shape), np.nan, np.float32)

    def write(self, values: np.ndarray, valid: np.ndarray, row: int, col: int) -> None:
        """Take a window (bands, h, w)."""
        here = np.s_[:, row : row + valid.shape[0], col : col + valid.shape[1]]
        self.values[here] = np.where(valid, values, np.nan)

    def array(self, name: str) -> xarray.DataArray:
        """With dimensions (y, x), or (band, y, x) if there are several, and its CRS."""
        import rioxarray  # noqa: F401  (registers the .rio accessor)
        from odc.geo.xr import wrap_xr

        made = wrap_xr(self.values, self.grid.geobox, dims=("band", "y", "x"), axis=1, nodata=np.nan)
        made = made.assign_coords(band=self.bands).rename(name)
        return made if len(self.bands) > 1 else made[0].drop_vars("band")


def _writer(path: Path, grid: Grid, bands: Sequence[str], tags: dict[str, str], mode: str) -> CogWriter:
    if bands != ("class",):
        return CogWriter(path, grid, [BandSpec(name) for name in bands], tags=tags)
    legend = CHANGE_CLASSES if mode == "dates" else COVER_CLASSES
    tags = tags | {"CANOPY_CLASSES": "; ".join(f"{code} {name}" for code, name in legend.items())}
    spec = BandSpec("class", "1")
    return CogWriter(path, grid, [spec], tags=tags, encoding="uint8m", overviews="mode")


def _walk(
    one: HeightMap, two: HeightMap, grid: Grid, mode: str, why: str, options: CompareOptions,
    sinks: Sequence[_ArraySink | CogWriter], area: AOI | None, progress: Progress | None,
) -> Comparison:  # fmt: skip
    """Read both maps in windows of about 1000 px: memory does not depend on their size."""
    dates, cover_m, progress = mode == "dates", options.cover_m, progress or NoProgress()
    z = z_of(options.confidence)
    errors = (
        choose_error("a", options.sigma_a, one.level, one.step_m),
        choose_error("b", options.sigma_b, two.level, two.step_m),
    )
    legend = CHANGE_CLASSES if dates else COVER_CLASSES
    names = ["a", "b", "abs", "area", "canopy", "blind", *legend.values()]
    blocks = BlockSums(grid, max(1, round(options.block_m / grid.gsd_m)), names)
    preview = BlockSums.picture(grid, ["a", "b", *legend.values()])
    sums = PairSums(sorted({2.0, 5.0, 10.0, cover_m}))
    tiles = tiles_over(grid, TILE_PX)
    progress.start(len(tiles), "comparing")
    # Of the whole grid, so that a pixel's area does not depend on the window it is met in.
    row_areas = pixel_areas_m2(grid)
    for tile in tiles:
        row, col = grid.offset_of(tile)
        (a, in_a), (b, in_b) = (read_on(side, tile, interval=dates) for side in (one, two))
        valid = in_a & in_b
        if area is not None and not area.is_box:
            valid &= area.mask(tile)
        ground = np.broadcast_to(row_areas[row : row + tile.height, None], valid.shape)
        canopy = a[0] > cover_m
        blind = np.zeros(valid.shape, bool)
        if dates:
            stored = difference_interval(a, b, errors, z)
            codes = classify(a[0], b[0], stored[1], stored[2], cover_m)
            # Were it to fall to the ground, its change would be minus its height: would the interval hold 0?
            blind = canopy & (a[0] <= stored[2] - stored[0])
        else:
            stored, codes = b[:1] - a[:1], 1 + canopy + 2 * (b[0] > cover_m).astype(np.uint8)
        sinks[0].write(stored.astype(np.float32), valid, row, col)
        sinks[1].write(codes[None].astype(np.float32), valid, row, col)
        sums.add(a[0][valid], b[0][valid], ground[valid])
        members = {name: codes == code for code, name in legend.items()}
        preview.add(row, col, valid, {"a": a[0], "b": b[0], **members})
        parts = {"area": ground > 0, "canopy": canopy, "blind": blind, **members}
        by_area = {name: np.where(part, ground, 0) for name, part in parts.items()}
        blocks.add(row, col, valid, {"a": a[0], "b": b[0], "abs": np.abs(b[0] - a[0]), **by_area})
        progress.advance()
    if sums.n == 0:
        raise InputError(
            "no pixel is valid in both maps", where=f"{one.name}, {two.name}",
            remedy="check their nodata rules (--nodata-a, --nodata-b)",
        )  # fmt: skip
    canopy_m2, blind_m2 = (float(blocks.sums[name].sum()) for name in ("canopy", "blind"))
    rule = {
        "confidence": options.confidence,
        "error_a": errors[0].source,
        "error_b": errors[1].source,
        "expected_false_share": 1 - options.confidence,
        "undetectable_canopy_share": blind_m2 / canopy_m2 if canopy_m2 else 0.0,
    }
    facts = {
        "a": _side_facts(one),
        "b": _side_facts(two),
        "years_apart": years_apart(one.dates, two.dates),
        "grid": {
            "crs": _crs_text(grid), "width_px": grid.width, "height_px": grid.height, "gsd_m": grid.gsd_m,
            "bounds": list(grid.bounds),
        },
        "area": area.describe() if area else None,
        "cover_height_m": cover_m,
        "block_m": blocks.side_px * grid.gsd_m,
        "canopy_version": __version__,
        "mode_because": why,
    }  # fmt: skip
    notes = [*one.notes, *two.notes, *(_change_notes(rule) if dates else ())]
    return Comparison(mode, legend, facts, sums, blocks, preview, rule if dates else {}, notes)


def _change_notes(rule: Mapping[str, Any]) -> Iterator[str]:
    blind = rule["undetectable_canopy_share"]
    if blind > _BLIND_SHARE:
        yield (
            f"in {blind:.0%} of A's canopy not even the loss of all of it would be significant: the "
            "maps' errors are too wide for single pixels. Errors that both share (one model, one "
            "place) cancel: if you know what is left, give --sigma-a and --sigma-b"
        )
    for side in "ab":
        if rule[f"error_{side}"].startswith("ASSUMED"):
            yield f"the error of {side.upper()} is {rule[f'error_{side}']}"


def _crs_text(placed: Grid | HeightMap) -> str:
    return f"EPSG:{placed.crs.epsg}" if placed.crs.epsg else str(placed.crs.to_wkt())


def _side_facts(heights: HeightMap) -> dict[str, Any]:
    return {
        "name": heights.name,
        "kind": heights.kind,
        "files": len(heights.tiles),
        "crs": _crs_text(heights),
        "gsd_m": heights.gsd_m,
        "step_m": heights.step_m,
        "dates": "/".join(heights.dates) or "unknown",
        "model": heights.tags.get("CANOPY_MODEL"),
        "interval_level": heights.level,
    }


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` whose files move into it at the end, or vanish on an error."""
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError("no such directory", where=parent, remedy="create it first")
    with (
        told_as_output(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=parent) as folder,
    ):
        yield Path(folder)
        out.mkdir(exist_ok=True)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, out / path.name)
