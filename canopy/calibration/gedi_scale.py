"""`canopy calibrate gedi`: correct a height map by GEDI shots, with its own uncertainty and a report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy import __version__
from canopy.calibration.discs import Footprints, map_grid, read_footprints
from canopy.calibration.gap import FootprintGap, gap_of
from canopy.calibration.gedi_fit import GRID_M, METHODS, Correction, fit_correction, held_out, scores_on
from canopy.calibration.monotone import TREND_LIMIT
from canopy.errors import ConfigError, InputError
from canopy.files import replacing
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    from canopy.geo.grid import Grid

HEIGHT_BANDS = ("canopy_height", "height_lower", "height_upper")
ERROR_BAND = "correction_se"
_WINDOW_PX = 1024


@dataclass(frozen=True)
class ScaleFiles:
    """The corrected map and what lies beside it."""

    tif: Path
    diagnostics: Path
    picture: Path

    @classmethod
    def of(cls, out: str | Path) -> ScaleFiles:
        """Names beside `out`; InputError where it is no GeoTIFF's name."""
        tif = Path(out)
        if tif.suffix.lower() not in (".tif", ".tiff"):
            raise InputError("is not a GeoTIFF's name", where=out, expected="a file name ending in .tif")
        return cls(tif, tif.with_suffix(".gedi.json"), tif.with_suffix(".gedi.png"))

    def check(self, inputs: list[Path], overwrite: bool) -> None:
        """Refuse names that exist or name an input. Raises InputError."""
        for path in (self.tif, self.diagnostics, self.picture):
            if path.resolve() in {p.resolve() for p in inputs}:
                raise InputError("is one of the inputs", where=path, remedy="choose another name with -o")
            if path.exists() and not overwrite:
                raise InputError(
                    "exists already", where=path, remedy="add --overwrite, or choose another name with -o"
                )
        if not self.tif.absolute().parent.is_dir():
            raise InputError("no such directory", where=self.tif.absolute().parent, remedy="create it first")


def correct_map(
    map_path: str | Path,
    shots_path: str | Path,
    out: str | Path,
    *,
    method: str = "spline",
    rh: int = 98,
    jitter_m: float = 10.0,
    spacing_m: float = 5_000.0,
    encoding: str = "float32",
    model: str | Path | None = None,
    imagery: str | Path | None = None,
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
        jitter_m: standard deviation of a shot's position error, metres per axis.
        spacing_m: distance between the nodes of the spatial trend; smaller maps have none.
        encoding: of the result, as for `canopy predict`.
        model, imagery: a GEDI model (pipelines/train_gedi.py) and the map's imagery. The map is then matched
            to what the model predicts over all of it, as published, and the shots only score the result.

    Returns:
        The diagnostics, JSON-ready.

    Raises:
        InputError: whatever is wrong with map, shots or options; nothing was written.
    """
    from canopy.sources.gedi_shots import read_shots

    map_path, files = Path(map_path), ScaleFiles.of(out)
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", where="--method", expected=" or ".join(METHODS))
    if not (np.isfinite(jitter_m) and 0 <= jitter_m <= 100):
        raise ConfigError(f"a position error of {jitter_m:g} m", where="--jitter-m", expected="0 to 100")
    if not (np.isfinite(spacing_m) and spacing_m > 0):
        raise ConfigError(f"nodes {spacing_m:g} m apart", where="--trend-m", expected="a number above 0")
    files.check([map_path, Path(shots_path)], overwrite)
    grid = map_grid(map_path)
    gap = _gap(map_path, rh)
    shots = replace(read_footprints(map_path, read_shots(shots_path), rh=rh, sigma_m=jitter_m), gap=gap)
    correction, scores = _fit(map_path, shots, method, spacing_m, model, imagery)
    report = {
        "map": map_path.name, "shots": Path(shots_path).name, "method": method, "rh": rh,
        "jitter_m": jitter_m, "footprint_gap": "of the map's model" if gap else "not known, taken as none",
        **correction.facts, "held_out": scores,
        "curve": _curve(correction), "limits": _limits(shots),
    }  # fmt: skip
    sha256 = _write(map_path, grid, correction, files.tif, report, encoding, overwrite, progress)
    report |= {"output": files.tif.name, "sha256": sha256}
    _write_report(files, report, shots, correction)
    return report | {"output": str(files.tif), "diagnostics": str(files.diagnostics)}


def _gap(map_path: Path, rh: int) -> FootprintGap | None:
    """The footprint gap in the map's tags; says so where there is none."""
    from canopy.geo.raster import open_raster

    with open_raster(map_path) as dataset:
        gap = gap_of(dataset.tags(), rh)
    if gap is None:
        log.warning(
            f"note: {map_path.name} has no footprint gap of its model: its RH{rh} is matched as it is, which "
            "lifts maps that are smoother than the canopy"
        )
    return gap


def _fit(
    map_path: Path, shots: Footprints, method: str, spacing_m: float, model: str | Path | None,
    imagery: str | Path | None,
) -> tuple[Correction, dict[str, Any]]:  # fmt: skip
    """The correction, and its scores on shots that it was not fitted on."""
    if model is None:
        return fit_correction(shots, method, spacing_m=spacing_m), held_out(shots, spacing_m=spacing_m)
    if imagery is None:
        raise ConfigError(
            "a GEDI model needs imagery", where="--model", remedy="give --imagery, the map's own"
        )
    from canopy.calibration.gedi_area import predicted_footprints
    from canopy.sources.imagery import open_imagery

    predicted = predicted_footprints(map_path, model, open_imagery(imagery, area=None))
    predicted = replace(predicted, gap=shots.gap)
    if predicted.percent != shots.percent:
        raise ConfigError(f"the GEDI model predicts RH{predicted.percent}", where=f"--rh {shots.percent}")
    made = {name: fit_correction(predicted, name, spacing_m=spacing_m) for name in METHODS}
    made[method].facts["fitted_on"] = f"{len(predicted)} footprints predicted by {Path(model).name}"
    return made[method], scores_on(shots, made)


def _curve(correction: Correction) -> dict[str, list[float]]:
    at = np.arange(0, 51, 2.5)
    change = correction.heights(at, 1.0) - at
    return {
        "map_m": at.tolist(),
        "change_m": np.round(change, 3).tolist(),
        "se_m": np.round(correction.errors(at, 0.0), 3).tolist(),
    }


def _limits(shots: Footprints) -> dict[str, float]:
    """How far the evidence reaches: percentiles of the map under the shots."""
    values = shots.map_m[np.isfinite(shots.map_m)]
    low, middle, high = np.percentile(values, (5, 50, 95))
    return {"map_p5_m": round(low, 2), "map_median_m": round(middle, 2), "map_p95_m": round(high, 2)}


def _write(
    map_path: Path, grid: Grid, correction: Correction, out: Path, report: dict[str, Any], encoding: str,
    overwrite: bool, progress: Progress | None,
) -> str:  # fmt: skip
    """Correct window by window; returns the file's SHA-256."""
    from canopy.geo.raster import BandSpec, CogWriter, open_raster, read_raster

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
            factor, trend_se = _trend_on(correction, grid, row, col, window.shape)
            error = correction.errors(values[0], trend_se)
            for band in corrected:
                values[band] = correction.heights(values[band], factor)
            stacked = np.concatenate([values, error[None]]).astype(np.float32)
            writer.write(stacked, raster.valid, row, col)
            progress.advance()
    return str(writer.sha256)


def _trend_on(
    correction: Correction, grid: Grid, row: int, col: int, shape: tuple[int, int]
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """1 + the trend, and the trend's standard error, on a window; plain numbers where there is no trend."""
    trend = correction.trend
    if not trend.values.any() and not correction.trend_se.any():
        return 1.0, 0.0
    rows = trend.along(1, (row + 0.5 + np.arange(shape[0])) * grid.gsd_m)
    cols = trend.along(0, (col + 0.5 + np.arange(shape[1])) * grid.gsd_m)
    change = np.clip(rows @ trend.values @ cols.T, -TREND_LIMIT, TREND_LIMIT)
    return 1 + change, rows @ correction.trend_se @ cols.T


def _write_report(
    files: ScaleFiles, report: dict[str, Any], shots: Footprints, correction: Correction
) -> None:
    from canopy.calibration.pictures import draw_correction

    with replacing(files.diagnostics, "cannot write the report") as part:
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draw_correction(files.picture, shots, correction, report)


__all__ = ["GRID_M", "ScaleFiles", "correct_map"]
