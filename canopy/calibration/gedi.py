"""`canopy calibrate gedi`: correct a height map by the GEDI shots that lie on it.

A shot's place is known to some 10 m, so map and shot must not be compared pair by pair: tall places would be
compared with their lower surroundings, and every regression would come out too flat (errors in the
regressor). Their distributions do not suffer from that: over all shots, both have seen the same ground. So
the correction is the monotone curve that takes the quantiles of the map's discs to those of the shots
(quantile matching; Panofsky and Brier 1958), a PCHIP spline through a dozen of them, with robust weights:
shots that the curve of the others cannot explain (clouds, wrong modes) do not count. Its standard error is
that of a bootstrap over blocks of ground; a change is shrunk by it, and without clear evidence there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from canopy import __version__
from canopy.errors import DataError
from canopy.evaluation.grids import own_grid
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.opening import open_heights
from canopy.files import check_output, replacing, write_json
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_raster
from canopy.geo.style import ramp_style
from canopy.labels.footprint import pool_over_disc
from canopy.labels.shots import read_shots, rh_column
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import pandas

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
_ERROR_BAND = "correction_se"
_WINDOW_PX = 1024


# ---- shots on the map -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Footprints:
    """Shots beside the map, in rows.

    Attributes:
        height_m: (n,) relative height of the shot, e.g. RH98.
        map_m: (n,) the map's same percentile over the disc at the shot's reported place.
        xy_m: (n, 2) place in metres, in a plane local to the map.
    """

    height_m: np.ndarray
    map_m: np.ndarray
    xy_m: np.ndarray

    def __len__(self) -> int:
        return len(self.height_m)

    def take(self, chosen: np.ndarray) -> Footprints:
        """These rows only."""
        return Footprints(self.height_m[chosen], self.map_m[chosen], self.xy_m[chosen])

    @property
    def block(self) -> np.ndarray:
        """(n,) number of the block of ground each shot lies in: about 64 blocks, of at least 120 m."""
        span = np.maximum(np.ptp(self.xy_m, axis=0), 1.0)
        side = max(120.0, float(np.sqrt(span[0] * span[1]) / 8))
        cells = np.floor((self.xy_m - self.xy_m.min(axis=0)) / side).astype(np.int64)
        return np.unique(cells, axis=0, return_inverse=True)[1].ravel()


def read_footprints(heights: HeightMap, shots: pandas.DataFrame, rh: int = 98) -> Footprints:
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

    def read(window: Grid) -> np.ndarray:
        values, valid = heights.read(window)
        return np.where(valid, values[0], np.nan)

    mapped = pool_over_disc(read, shots, f"p{rh}", grid=own_grid(heights)).astype(np.float64)
    seen = np.isfinite(height) & np.isfinite(mapped)
    if not seen.any():
        raise DataError(f"none of {len(shots)} shots lies on the map", where=heights.name)
    lon, lat = (shots[name].to_numpy(np.float64)[seen] for name in ("lon", "lat"))
    scale = METRES_PER_DEGREE * np.array([np.cos(np.deg2rad(lat.mean())), 1.0])
    xy = (np.column_stack([lon, lat]) - [lon.mean(), lat.mean()]) * scale
    return Footprints(height[seen], mapped[seen], xy)


# ---- the correction ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Correction:
    """A correction of heights; what is 0 m or lower stays, and order is kept.

    Attributes:
        level_m, se_m: corrected heights at `GRID_M` and their standard errors.
        shots: that it was fitted to; outlier_share: of them that do not count; noise_m: spread of the others.
    """

    level_m: np.ndarray
    se_m: np.ndarray
    shots: int
    outlier_share: float
    noise_m: float

    def __call__(self, map_m: np.ndarray) -> np.ndarray:
        """Corrected heights, metres, of heights of any shape; NaN stays NaN."""
        level = np.interp(map_m, GRID_M, self.level_m) + np.maximum(map_m - GRID_M[-1], 0)
        cap = np.maximum(_CAP_SHARE * map_m, np.minimum(_CAP_M, map_m))
        return np.where(map_m > 0, np.clip(level, map_m - cap, map_m + cap), map_m)

    def errors(self, map_m: np.ndarray) -> np.ndarray:
        """Standard error of the corrected heights, metres; 0 at 0 m."""
        return np.where(np.isfinite(map_m), np.interp(map_m, GRID_M, self.se_m), np.nan)


def fit_correction(shots: Footprints) -> Correction:
    """Fit the curve.

    Raises:
        DataError: fewer than `LEAST_SHOTS` shots.
    """
    if len(shots) < LEAST_SHOTS:
        raise DataError(
            f"{len(shots)} shots on the map",
            expected=f"at least {LEAST_SHOTS}",
            remedy="use shots of a larger area or a looser filter",
        )
    curve, good, spread = _robust_curve(shots)
    draws = np.stack([_robust_curve(shots.take(rows))[0] for rows in _resamples(shots)])
    error = draws.std(axis=0, ddof=1)
    error[0] = 0.0
    z = np.divide(np.abs(curve - GRID_M), error, out=np.zeros(len(GRID_M)), where=error > 0)
    seen = (shots.map_m.min() <= GRID_M) & (shots.map_m.max() >= GRID_M)
    if z[seen].max(initial=0.0) < _CLEAR_Z:
        curve = GRID_M
    kept = np.maximum(0.0, 1.0 - (_SHRINK_Z / np.maximum(z, 1e-9)) ** 2)
    level = np.maximum.accumulate(GRID_M + kept * (curve - GRID_M))
    return Correction(level, error, len(shots), float(1 - good.mean()), spread)


def _robust_curve(shots: Footprints) -> tuple[np.ndarray, np.ndarray, float]:
    """Corrected heights at `GRID_M`, which shots (n,) they rest on, and those shots' spread in metres."""
    good = np.ones(len(shots), bool)
    curve, spread = GRID_M, 0.0
    for _ in range(_ROUNDS):
        curve = _matched(shots.map_m[good], shots.height_m[good])
        residual = shots.height_m - np.interp(shots.map_m, GRID_M, curve)
        deviation = np.median(np.abs(residual[good] - np.median(residual[good])))
        spread = max(_LEAST_SD_M, 1.4826 * float(deviation))
        good = np.abs(residual) <= _OUTLIER_SD * spread
        if good.sum() < LEAST_SHOTS / 2:
            break
    return curve, good, spread


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
    rng, block = np.random.default_rng(0), shots.block
    rows = [np.flatnonzero(block == number) for number in range(int(block.max()) + 1)]
    for _ in range(_REPLICATES):
        yield np.concatenate([rows[number] for number in rng.integers(0, len(rows), len(rows))])


def held_out(shots: Footprints) -> dict[str, Any]:
    """Scores before and after correction of shots that their fit has not seen.

    Blocks of ground are dealt into `_FOLDS` parts; each part is scored by a fit on the others. Metres, map
    minus shot at the reported places; `mae_good_m` leaves out shots that this fit calls outliers, so that
    clouds do not drown the comparison.
    """
    block = shots.block
    fold = np.random.default_rng(1).permutation(int(block.max()) + 1)[block] % _FOLDS
    parts = []
    for number in range(_FOLDS):
        test, train = shots.take(fold == number), shots.take(fold != number)
        if len(test) and len(train) >= LEAST_SHOTS:
            made = fit_correction(train)
            before, after = test.map_m - test.height_m, made(test.map_m) - test.height_m
            parts.append(np.stack([before, after, np.abs(after) <= _OUTLIER_SD * made.noise_m]))
    if not parts:
        return {"n": 0}
    before, after, good = np.concatenate(parts, axis=1)
    report: dict[str, Any] = {"n": len(before), "n_good": int(good.sum())}
    for name, error in (("before", before), ("after", after)):
        fine = error[good > 0]
        report[name] = {
            "mae_m": round(float(np.abs(error).mean()), 3),
            "mae_good_m": round(float(np.abs(fine).mean()), 3) if len(fine) else None,
            "bias_good_m": round(float(fine.mean()), 3) if len(fine) else None,
        }
    return report


# ---- the map ----------------------------------------------------------------------------------------------
def correct_map(
    map_path: str | Path,
    shots_path: str | Path,
    out: str | Path,
    *,
    rh: int = 98,
    band: int | str | None = None,
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
        map_path: a height GeoTIFF.
        shots_path: table of `canopy data gedi`, or any Parquet or CSV with shot_number, lat, lon and rh_NN.
        out: the GeoTIFF to write.
        rh: relative height to compare with the same percentile of the map's pixels in the disc.
        band: number or name of the height's band, of a file with several.
        encoding: of the result, as for `canopy predict`.

    Returns:
        The diagnostics, JSON-ready.

    Raises:
        InputError: whatever is wrong with map, shots or options; nothing was written.
    """
    map_path, tif = Path(map_path), Path(out)
    names = [tif, tif.with_suffix(".gedi.json"), tif.with_suffix(".gedi.png")]
    check_output(names, [map_path, shots_path], overwrite=overwrite, suffixes=(".tif", ".tiff"))
    with open_raster(map_path) as dataset:
        SourcePlace.of(dataset).north_up().grid()  # refuses rotated maps, and what is no file
    with open_heights(map_path, band=band) as heights:
        shots = read_footprints(heights, read_shots(shots_path), rh)
        correction, at = fit_correction(shots), np.arange(0, 51, 2.5)
        report: dict[str, Any] = {
            "map": map_path.name, "shots_file": Path(shots_path).name, "rh": rh, "shots": correction.shots,
            "outlier_share": round(correction.outlier_share, 4), "noise_m": round(correction.noise_m, 3),
            "held_out": held_out(shots),
            "curve": {
                "map_m": at.tolist(), "change_m": np.round(correction(at) - at, 3).tolist(),
                "se_m": np.round(correction.errors(at), 3).tolist(),
            },
        }  # fmt: skip
        tags = {
            "CANOPY_CORRECTION": f"gedi spline, RH{rh}, {Path(shots_path).name}",
            "CANOPY_CORRECTION_SHOTS": str(correction.shots),
            "CANOPY_CORRECTION_VERSION": __version__,
        }
        sha256 = _write(heights, correction, tif, tags, encoding, overwrite, progress)
        report |= {"output": tif.name, "sha256": sha256, "notes": list(heights.notes)}
    write_json(names[1], report)
    draw_correction(names[2], shots, correction, report)
    return report | {"output": str(tif), "diagnostics": str(names[1])}


def _write(
    heights: HeightMap, correction: Correction, out: Path, tags: dict[str, str], encoding: str,
    overwrite: bool, progress: Progress | None,
) -> str:  # fmt: skip
    """Correct window by window; returns the file's SHA-256."""
    path, which = heights.tiles[0].path, heights.tiles[0].bands.indexes
    with open_raster(path) as dataset:
        grid = SourcePlace.of(dataset).north_up().grid()
        given = zip(dataset.descriptions, dataset.units, strict=True)
        bands = [
            BandSpec(
                name or ("canopy_height" if i == which[0] else f"band_{i}"),
                "m" if i in which else unit or "m",
            )
            for i, (name, unit) in enumerate(given, 1)
        ]
        tags = {k: v for k, v in dataset.tags().items() if k.startswith("CANOPY_")} | tags
    windows = tiles_over(grid, _WINDOW_PX)
    progress = progress or NoProgress()
    progress.start(len(windows), "correcting")
    every = [*bands, BandSpec(_ERROR_BAND, "m")]
    with CogWriter(
        out, grid, every, encoding=encoding, tags=tags, overwrite=overwrite, style=ramp_style(0.0, 40.0)
    ) as writer:
        for window in windows:
            raster = read_raster(path, window, bands=list(range(1, len(every))))
            values = raster.values.astype(np.float64)
            metres, known = heights.read(window, interval=True)
            for index, band_m in zip(which, metres, strict=False):
                values[index - 1] = correction(band_m)
            stacked = np.concatenate([values, correction.errors(metres[:1])]).astype(np.float32)
            writer.write(stacked, raster.valid & known, *grid.offset_of(window))
            progress.advance()
        _ = heights.notes  # which refuses what is no canopy height, before the file has its name
    return str(writer.sha256)


def draw_correction(path: Path, shots: Footprints, correction: Correction, report: dict[str, Any]) -> None:
    """Two panels: shots against the map with the fitted curve, and the change with its standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    top = float(max(10.0, np.percentile(shots.map_m, 99.5), np.percentile(shots.height_m, 99)))
    heights = np.arange(0.0, top + 0.1, 0.25)
    level, error = correction(heights), correction.errors(heights)
    left.plot(shots.map_m, shots.height_m, ".", ms=3, alpha=0.4, color="tab:blue", label="shots")
    left.plot(heights, heights, "--", color="0.5", lw=1, label="no change")
    left.plot(heights, level, color="tab:red", label="correction")
    left.set(xlim=(0, top), ylim=(0, top * 1.15), xlabel=f"map, P{report['rh']} of the disc (m)")
    left.set_ylabel(f"GEDI RH{report['rh']} (m)")
    left.legend(loc="upper left", fontsize=8)
    right.fill_between(heights, level - heights - 2 * error, level - heights + 2 * error, alpha=0.25,
                       color="tab:red", lw=0, label="± 2 standard errors")  # fmt: skip
    right.plot(heights, level - heights, color="tab:red")
    right.axhline(0, color="0.5", lw=1, ls="--")
    right.set(xlim=(0, top), xlabel="map height (m)", ylabel="change (m)")
    scores = report["held_out"]
    if scores["n"]:
        before, after = (scores[name]["mae_good_m"] for name in ("before", "after"))
        right.set_title(f"held-out shots: MAE {before} m before, {after} m after", fontsize=9)
    right.legend(loc="best", fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130, metadata={"Software": None})
