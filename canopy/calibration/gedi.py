"""`canopy calibrate gedi`: correct a height map by the GEDI shots that lie on it.

A shot's place is known to some 10 m, so map and shot must not be compared pair by pair: tall places would be
compared with their lower surroundings, and every regression would come out too flat (errors in the
regressor). Their distributions do not suffer from that: over all shots, both have seen the same ground. So
the correction is the monotone curve that takes the quantiles of the map's discs to those of the shots
(quantile matching; Panofsky and Brier 1958), a PCHIP spline through a dozen of them, with robust weights:
shots that the curve of the others cannot explain (clouds, wrong modes) do not count. Its standard error is
that of a bootstrap over blocks of ground; a change is shrunk by it, and without clear evidence there is none.
`scalar` is the published correction, one factor (Tolan et al. 2024).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from canopy import __version__
from canopy.errors import ConfigError, DataError
from canopy.files import check_output, replacing
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.geo.grid import Grid
from canopy.labels.footprint import pool_over_disc
from canopy.labels.shots import read_shots, rh_column
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import pandas

METHODS = ("spline", "scalar")
LEAST_SHOTS = 20
GRID_M = np.arange(0.0, 120.01, 0.25)
_QUANTILES = np.concatenate([[0.02], np.arange(0.05, 0.96, 0.075), [0.98]])
# A shot further than this many robust standard deviations from the curve does not count.
_OUTLIER_SD, _LEAST_SD_M, _ROUNDS = 3.0, 1.0, 4
# Some height must change by this many standard errors: among a dozen quantiles, one passes 2.5 by chance too
# often; and a change shrinks to nothing where it is only so many.
_CLEAR_Z, _SHRINK_Z = 3.5, 2.0
# Lower quantiles are ground, or what the pulse's own width makes of it.
_GROUND_M = 2.0
# No height changes by more than this share of itself, or this many metres where that is more.
_CAP_SHARE, _CAP_M = 0.75, 1.0
_REPLICATES, _FOLDS = 24, 5
_PERCENTILES = np.arange(50, 100, 5)
HEIGHT_BANDS = ("canopy_height", "height_lower", "height_upper")
ERROR_BAND = "correction_se"
_WINDOW_PX = 1024


# --- shots on the map ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprints:
    """Shots beside the map, in rows.

    Attributes:
        height_m: (n,) relative height of the shot, e.g. RH98.
        map_m: (n,) the map's same percentile over the disc at the shot's reported place.
        xy_m: (n, 2) place in metres, in a plane local to the map.
        percent: which percentile of the disc, e.g. 98.
    """

    height_m: np.ndarray
    map_m: np.ndarray
    xy_m: np.ndarray
    percent: int = 98

    def __len__(self) -> int:
        return len(self.height_m)

    def take(self, chosen: np.ndarray) -> Footprints:
        """These rows only."""
        return Footprints(self.height_m[chosen], self.map_m[chosen], self.xy_m[chosen], self.percent)


def read_footprints(map_path: str | Path, shots: pandas.DataFrame, rh: int = 98) -> Footprints:
    """The shots whose disc the map shows, with the map's percentile there.

    Raises DataError where the table lacks the height, or no shot lies on the map.
    """
    column = rh_column(rh)
    if column not in shots:
        raise DataError(
            f"no column {column} in the shots",
            expected=", ".join(name for name in shots if str(name).startswith("rh_")),
            remedy="give --rh one of them",
        )
    height = shots[column].to_numpy(np.float64)
    mapped = pool_over_disc(map_path, shots, f"p{rh}").astype(np.float64)
    seen = np.isfinite(height) & np.isfinite(mapped)
    if not seen.any():
        raise DataError(f"none of {len(shots)} shots lies on the map", where=map_path)
    lon, lat = (shots[name].to_numpy(np.float64)[seen] for name in ("lon", "lat"))
    scale = METRES_PER_DEGREE * np.array([np.cos(np.deg2rad(lat.mean())), 1.0])
    xy = (np.column_stack([lon, lat]) - [lon.mean(), lat.mean()]) * scale
    return Footprints(height[seen], mapped[seen], xy, rh)


def map_grid(path: str | Path) -> Grid:
    """The grid of a north-up map. Raises DataError for rotated ones."""
    from canopy.geo.place import SourcePlace
    from canopy.geo.reading import open_raster

    with open_raster(path) as dataset:
        return SourcePlace.of(dataset).grid()


# --- the correction ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correction:
    """A correction of heights; what is 0 m or lower stays, and order is kept.

    Attributes:
        method: "spline" or "scalar".
        level_m, se_m: corrected heights at `GRID_M` and their standard errors.
        facts: JSON-ready numbers about the fit.
    """

    method: str
    level_m: np.ndarray
    se_m: np.ndarray
    facts: dict[str, Any]

    def __call__(self, map_m: np.ndarray) -> np.ndarray:
        """Corrected heights, metres, of heights of any shape; NaN stays NaN."""
        slope = self.level_m[-1] / GRID_M[-1] if self.method == "scalar" else 1.0
        level = _on_curve(map_m, self.level_m, slope)
        cap = np.maximum(_CAP_SHARE * map_m, np.minimum(_CAP_M, map_m))
        return np.where(map_m > 0, np.clip(level, map_m - cap, map_m + cap), map_m)

    def errors(self, map_m: np.ndarray) -> np.ndarray:
        """Standard error of the corrected heights, metres; 0 at 0 m."""
        return np.where(np.isfinite(map_m), np.interp(map_m, GRID_M, self.se_m), np.nan)


def fit_correction(shots: Footprints, method: str = "spline") -> Correction:
    """Fit one of the `METHODS`.

    Raises:
        ConfigError: an unknown method. DataError: fewer than `LEAST_SHOTS` shots.
    """
    _check_method(method)
    if len(shots) < LEAST_SHOTS:
        raise DataError(
            f"{len(shots)} shots on the map",
            expected=f"at least {LEAST_SHOTS}",
            remedy="use shots of a larger area or a looser filter",
        )
    return _scalar(shots) if method == "scalar" else _spline(shots)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", where="--method", expected=" or ".join(METHODS))


def _scalar(shots: Footprints) -> Correction:
    """One factor that matches the percentiles of map and shots; it uses every shot, and cannot lift zeros."""
    factor = _factor(shots)
    error = float(np.std([_factor(shots.take(rows)) for rows in _resamples(shots)], ddof=1))
    facts = {"factor": round(factor, 4), "factor_se": round(error, 4), "shots": len(shots)}
    return Correction("scalar", GRID_M * factor, GRID_M * error, facts)


def _factor(shots: Footprints) -> float:
    """Least squares through 0 of the shots' percentiles on the map's; 1 where the map has nothing."""
    observed, mapped = (np.percentile(v, _PERCENTILES) for v in (shots.height_m, shots.map_m))
    return float(observed @ mapped / max(mapped @ mapped, 1e-9)) if mapped.any() else 1.0


def _spline(shots: Footprints) -> Correction:
    curve, good, spread = _robust_curve(shots)
    draws = np.stack([_robust_curve(shots.take(rows))[0] for rows in _resamples(shots)])
    error = draws.std(axis=0, ddof=1)
    error[0] = 0.0
    z = np.divide(np.abs(curve - GRID_M), error, out=np.zeros(len(GRID_M)), where=error > 0)
    seen = (shots.map_m.min() <= GRID_M) & (shots.map_m.max() >= GRID_M)
    if z[seen].max(initial=0.0) < _CLEAR_Z:
        curve = GRID_M
    kept = np.maximum(0.0, 1.0 - (_SHRINK_Z / np.maximum(z, 1e-9)) ** 2)
    curve = np.maximum.accumulate(GRID_M + kept * (curve - GRID_M))
    facts = {
        "shots": len(shots),
        "outlier_share": round(float(1 - good.mean()), 4),
        "noise_m": round(spread, 3),
    }
    return Correction("spline", curve, error, facts)


def _robust_curve(shots: Footprints) -> tuple[np.ndarray, np.ndarray, float]:
    """Corrected heights at `GRID_M`, which shots (n,) they rest on, and those shots' spread in metres."""
    good = np.ones(len(shots), bool)
    curve, spread = GRID_M, 0.0
    for _ in range(_ROUNDS):
        curve = _matched(shots.map_m[good], shots.height_m[good])
        residual = shots.height_m - np.interp(shots.map_m, GRID_M, curve)
        spread = max(
            _LEAST_SD_M, 1.4826 * float(np.median(np.abs(residual[good] - np.median(residual[good]))))
        )
        good = np.abs(residual) <= _OUTLIER_SD * spread
        if good.sum() < LEAST_SHOTS / 2:
            break
    return curve, good, spread


def _on_curve(map_m: np.ndarray, level_m: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """The curve through (`GRID_M`, level_m), which goes on at `slope`."""
    return np.interp(map_m, GRID_M, level_m) + np.maximum(map_m - GRID_M[-1], 0) * slope


def _matched(mapped: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The monotone curve through (0, 0) and the quantiles of both, at `GRID_M`; beyond the last it runs on by
    the same number of metres."""
    x, y = np.quantile(mapped, _QUANTILES), np.maximum(np.quantile(seen, _QUANTILES), 0.0)
    # Steps that PCHIP can divide by.
    keep = np.concatenate([[True], np.diff(np.maximum.accumulate(x)) > 0.05]) & (x > _GROUND_M)
    x, y = np.concatenate([[0.0], x[keep]]), np.concatenate([[0.0], np.maximum.accumulate(y[keep])])
    if len(x) < 3:
        return GRID_M
    inside = np.minimum(GRID_M, x[-1])
    level = PchipInterpolator(x, y)(inside) + (GRID_M - inside)
    return np.maximum.accumulate(np.maximum(level, 0.0))


def _resamples(shots: Footprints) -> Iterator[np.ndarray]:
    """`_REPLICATES` times the rows (m,) of blocks of ground drawn with replacement."""
    rng = np.random.default_rng(0)
    block = blocks_of(shots.xy_m)
    rows = [np.flatnonzero(block == number) for number in range(int(block.max()) + 1)]
    for _ in range(_REPLICATES):
        yield np.concatenate([rows[number] for number in rng.integers(0, len(rows), len(rows))])


def blocks_of(xy_m: np.ndarray) -> np.ndarray:
    """(n,) number of the block of ground each shot lies in: about 64 blocks, of at least 120 m."""
    span = np.ptp(xy_m, axis=0)
    side = max(120.0, float(np.sqrt(max(span[0], 1.0) * max(span[1], 1.0)) / 8))
    cells = np.floor((xy_m - xy_m.min(axis=0)) / side).astype(np.int64)
    _, block = np.unique(cells, axis=0, return_inverse=True)
    return block.ravel()


def held_out(shots: Footprints) -> dict[str, Any]:
    """Scores of no correction, the scalar and the spline on shots that their fit has not seen.

    Blocks of ground are dealt into `_FOLDS` parts; each part is scored by fits on the others. Metres, map
    minus shot at the reported places; `mae_good_m` leaves out shots that the spline's fit on the other
    parts calls outliers, so that clouds do not drown the comparison.
    """
    block = blocks_of(shots.xy_m)
    fold = np.random.default_rng(1).permutation(int(block.max()) + 1)[block] % _FOLDS
    errors: dict[str, list[np.ndarray]] = {}
    good: list[np.ndarray] = []
    for number in range(_FOLDS):
        test, train = shots.take(fold == number), shots.take(fold != number)
        if not len(test) or len(train) < LEAST_SHOTS:
            continue
        made = {name: fit_correction(train, name) for name in METHODS}
        values = {"before": test.map_m} | {name: one(test.map_m) for name, one in made.items()}
        for name, value in values.items():
            errors.setdefault(name, []).append(value - test.height_m)
        limit = _OUTLIER_SD * made["spline"].facts["noise_m"]
        good.append(np.abs(values["spline"] - test.height_m) <= limit)
    if not good:
        return {"n": 0}
    kept = np.concatenate(good)
    rows = {name: _scores(np.concatenate(parts), kept) for name, parts in errors.items()}
    return {"n": len(kept), "n_good": int(kept.sum()), **rows}


def _scores(error: np.ndarray, kept: np.ndarray) -> dict[str, float | None]:
    fine = error[kept]
    return {
        "mae_m": round(float(np.abs(error).mean()), 3),
        "median_error_m": round(float(np.median(error)), 3),
        "mae_good_m": round(float(np.abs(fine).mean()), 3) if len(fine) else None,
        "bias_good_m": round(float(fine.mean()), 3) if len(fine) else None,
    }


# --- the map -------------------------------------------------------------------------------------------


def correct_map(
    map_path: str | Path,
    shots_path: str | Path,
    out: str | Path,
    *,
    method: str = "spline",
    rh: int = 98,
    encoding: str = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit a correction on the shots that lie on a map and write the corrected map.

    The result has the map's bands: heights (canopy_height, height_lower, height_upper) corrected, others as
    they were, and `correction_se`, the standard error of the correction in metres. Pixels of 0 m
    stay 0 m; nodata stays nodata. OUT.gedi.json and OUT.gedi.png tell how it was fitted and how it does on
    shots that it was not fitted on.

    Args:
        map_path: a height GeoTIFF in metres, band 1.
        shots_path: table of `canopy data gedi`, or any Parquet or CSV with shot_number, lat, lon and rh_NN.
        out: the GeoTIFF to write.
        method: "spline" or "scalar".
        rh: relative height to compare with the same percentile of the map's pixels in the disc.
        encoding: of the result, as for `canopy predict`.

    Returns:
        The diagnostics, JSON-ready.

    Raises:
        InputError: whatever is wrong with map, shots or options; nothing was written.
    """
    _check_method(method)
    map_path, tif = Path(map_path), Path(out)
    names = [tif, tif.with_suffix(".gedi.json"), tif.with_suffix(".gedi.png")]
    check_output(names, [map_path, shots_path], overwrite=overwrite, suffixes=(".tif", ".tiff"))
    grid = map_grid(map_path)
    shots = read_footprints(map_path, read_shots(shots_path), rh)
    correction = fit_correction(shots, method)
    report = {
        "map": map_path.name, "shots": Path(shots_path).name, "method": method, "rh": rh,
        **correction.facts, "held_out": held_out(shots),
        "curve": _curve(correction), "limits": _limits(shots),
    }  # fmt: skip
    sha256 = _write(map_path, grid, correction, tif, report, encoding, overwrite, progress)
    report |= {"output": tif.name, "sha256": sha256}
    with replacing(names[1], "cannot write the report") as part:
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draw_correction(names[2], shots, correction, report)
    return report | {"output": str(tif), "diagnostics": str(names[1])}


def _curve(correction: Correction) -> dict[str, list[float]]:
    at = np.arange(0, 51, 2.5)
    change = correction(at) - at
    return {
        "map_m": at.tolist(),
        "change_m": np.round(change, 3).tolist(),
        "se_m": np.round(correction.errors(at), 3).tolist(),
    }


def _limits(shots: Footprints) -> dict[str, float]:
    """How far the evidence reaches: percentiles of the map under the shots."""
    low, middle, high = np.percentile(shots.map_m, (5, 50, 95))
    return {"map_p5_m": round(low, 2), "map_median_m": round(middle, 2), "map_p95_m": round(high, 2)}


def _write(
    map_path: Path, grid: Grid, correction: Correction, out: Path, report: dict[str, Any], encoding: str,
    overwrite: bool, progress: Progress | None,
) -> str:  # fmt: skip
    """Correct window by window; returns the file's SHA-256."""
    from canopy.geo.cog import BandSpec, CogWriter
    from canopy.geo.reading import open_raster, read_raster

    progress = progress or NoProgress()
    with open_raster(map_path) as dataset:
        named = [
            dataset.descriptions[i] or ("canopy_height" if i == 0 else f"band_{i + 1}")
            for i in range(dataset.count)
        ]
        units = [dataset.units[i] or "m" for i in range(dataset.count)]
        tags = {k: v for k, v in dataset.tags().items() if k.startswith("CANOPY_")}
    bands = [BandSpec(name, unit) for name, unit in zip(named, units, strict=True)]
    tags |= {
        "CANOPY_CORRECTION": f"gedi {correction.method}, RH{report['rh']}, {report['shots']}",
        "CANOPY_CORRECTION_SHOTS": str(correction.facts["shots"]),
        "CANOPY_CORRECTION_VERSION": __version__,
    }
    corrected = [i for i, name in enumerate(named) if name in HEIGHT_BANDS or i == 0]
    writer = CogWriter(
        out, grid, [*bands, BandSpec(ERROR_BAND, "m")], encoding=encoding, tags=tags, overwrite=overwrite
    )
    tiles = [(r, c) for r in range(0, grid.height, _WINDOW_PX) for c in range(0, grid.width, _WINDOW_PX)]
    progress.start(len(tiles), "correcting")
    with writer:
        for row, col in tiles:
            window = grid.window(
                row, col, min(_WINDOW_PX, grid.height - row), min(_WINDOW_PX, grid.width - col)
            )
            raster = read_raster(map_path, window, bands=list(range(1, len(bands) + 1)))
            values = raster.values.astype(np.float64)
            error = correction.errors(values[0])
            for band in corrected:
                values[band] = correction(values[band])
            stacked = np.concatenate([values, error[None]]).astype(np.float32)
            writer.write(stacked, raster.valid, row, col)
            progress.advance()
    return str(writer.sha256)


def draw_correction(path: Path, shots: Footprints, correction: Correction, report: dict[str, Any]) -> None:
    """Two panels: shots against the map with the fitted curve, and the change with its standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    top = float(max(10.0, np.percentile(shots.map_m, 99.5), np.percentile(shots.height_m, 99)))
    heights = np.arange(0.0, top + 0.1, 0.25)
    level, error = correction(heights), correction.errors(heights)
    left.plot(shots.map_m, shots.height_m, ".", ms=3, alpha=0.4, color="tab:blue", label="shots")
    left.plot(heights, heights, "--", color="0.5", lw=1, label="no change")
    left.plot(heights, level, color="tab:red", label=report["method"])
    left.set(xlim=(0, top), ylim=(0, top * 1.15), xlabel=f"map, P{shots.percent} of the disc (m)")
    left.set_ylabel(f"GEDI RH{shots.percent} (m)")
    left.legend(loc="upper left", fontsize=8)
    right.fill_between(heights, level - heights - 2 * error, level - heights + 2 * error, alpha=0.25,
                       color="tab:red", lw=0, label="± 2 standard errors")  # fmt: skip
    right.plot(heights, level - heights, color="tab:red")
    right.axhline(0, color="0.5", lw=1, ls="--")
    right.set(xlim=(0, top), xlabel="map height (m)", ylabel="change (m)", title=_headline(report))
    right.title.set_fontsize(9)
    right.legend(loc="best", fontsize=8)
    save(figure, path)


def _headline(report: dict[str, Any]) -> str:
    scores = report.get("held_out", {})
    if not scores.get("n"):
        return ""
    before, after = scores["before"]["mae_good_m"], scores[report["method"]]["mae_good_m"]
    return f"held-out shots: MAE {before} m before, {after} m after"


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; OutputError where that is impossible."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130, metadata={"Software": None})
