"""GEDI correction on real imagery: `python benchmarks/gedi_correction.py PACK --out DIR [--model NAME]`.

No real GEDI shot lies on imagery of the data pack. So shots are SIMULATED on its lidar heights: RH98 is the
98th percentile of the 1 m cells in a 25 m disc, with 1 m noise, reported 10 m (per axis) away, one in ten a
gross outlier. The model's maps of tiles it was not trained on are corrected by them; scores are on shots that
the fit has not seen, and on lidar pixels. The maps lie in DIR, too.
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

from canopy.calibration.collect import Scored, load_chips, predict_chips
from canopy.calibration.gedi import correct_map
from canopy.calibration.intervals import TAG, gaps_to_dict
from canopy.geo.cog import CogWriter
from canopy.geo.crs import transformer
from canopy.geo.encoding import BandSpec
from canopy.geo.grid import Grid
from canopy.geo.raster import Raster, read_raster
from canopy.labels.footprint import pool_over_disc
from canopy.models.checkpoint import load_model


def write_cog(path, raster, **options):
    """A whole raster as a map of one band; its sha256."""
    with CogWriter(path, raster.grid, [BandSpec("canopy_height")], **options) as writer:
        writer.write(raster.values, raster.valid)
    return writer.sha256


JITTER_M, NOISE_M, OUTLIERS, PER_HA = 10.0, 1.0, 0.1, 1.5


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--model", default="default", help="one that has not seen the val chips")
    parser.add_argument("--splits", default="val,test,test_hard")
    options = parser.parse_args(argv)
    chips, _ = load_chips(options.pack, options.splits.split(","))
    chips = [c for c in chips if c.row.kind != "neon"]
    scored = list(predict_chips(load_model(options.model), chips))
    with (options.pack / "manifest.csv").open(newline="") as file:
        places = {row["id"]: row for row in csv.DictReader(file)}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for site in dict.fromkeys(s.site for s in scored):
            # The gap is that of other sites: the site itself stands for new ground.
            gap = gaps_to_dict([s for s in scored if s.site != site and s.split == "val"])
            found[site] = _site([s for s in scored if s.site == site], places, gap, out)
    notes = ["Metres. Simulated shots, each held out once, outliers left out; lidar: pixels."]
    common.show("GEDI correction", [_row(site, result) for site, result in found.items()], notes)
    common.save(options.out, "gedi_correction", {"model": options.model, "splits": options.splits}, found)


def _site(
    tiles: list[Scored], places: dict[str, dict[str, str]], gap: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Mosaic a site's tiles, simulate shots, correct, score."""
    grid, predicted, truth = _mosaic(tiles, places)
    name = tiles[0].id.rsplit("_", 1)[0]
    chm = out / f"{name}.tif"
    tags = {TAG: json.dumps(gap)} if gap else {}
    write_cog(chm, Raster(predicted[None], np.isfinite(predicted), grid), tags=tags, overwrite=True)
    shots = _simulate(truth, grid, out / f"{name}.parquet")
    result: dict[str, Any] = {"tiles": len(tiles), "shots_simulated": shots}
    for method in ("spline", "scalar"):
        corrected = out / f"{name}_{method}.tif"
        report = correct_map(chm, out / f"{name}.parquet", corrected, method=method, overwrite=True)
        pixels = read_raster(corrected, bands=[1])
        error = (pixels.values[0] - truth)[np.isfinite(truth) & pixels.valid]
        result[method] = report["held_out"][method] | {
            "pixel_mae_m": round(float(np.abs(error).mean()), 3),
            "pixel_bias_m": round(float(error.mean()), 3),
        }
    error = (predicted - truth)[np.isfinite(truth) & np.isfinite(predicted)]
    result["before"] = report["held_out"]["before"] | {
        "pixel_mae_m": round(float(np.abs(error).mean()), 3),
        "pixel_bias_m": round(float(error.mean()), 3),
    }
    result["usual"] = report["held_out"]["usual"]
    return result | {"held_out_shots": report["held_out"]["n"]}


def _mosaic(tiles: list[Scored], places: dict[str, dict[str, str]]) -> tuple[Grid, np.ndarray, np.ndarray]:
    """Predicted and true heights of all tiles on one 1 m grid."""
    corner = [(float(places[t.id]["xmin"]), float(places[t.id]["ymax"])) for t in tiles]
    west, north = min(x for x, _ in corner), max(y for _, y in corner)
    starts = [(round(north - y), round(x - west)) for x, y in corner]
    height = max(r + t.truth_m.shape[0] for (r, _), t in zip(starts, tiles, strict=True))
    width = max(c + t.truth_m.shape[1] for (_, c), t in zip(starts, tiles, strict=True))
    maps = np.full((2, height, width), np.nan, np.float32)
    for (row, col), tile in zip(starts, tiles, strict=True):
        h, w = tile.truth_m.shape
        maps[0, row : row + h, col : col + w] = tile.height_m
        maps[1, row : row + h, col : col + w] = tile.truth_m
    grid = Grid.of(places[tiles[0].id]["crs"], (1.0, 0, west, 0, -1.0, north), (height, width))
    return grid, maps[0], maps[1]


def _simulate(truth: np.ndarray, grid: Grid, path: Path) -> int:
    """Write a table of simulated shots; returns how many there are."""
    import pandas

    rng = np.random.default_rng(0)
    count = int(PER_HA * np.isfinite(truth).sum() / 1e4 / max(np.isfinite(truth).mean(), 1e-6))
    west, south, east, north = grid.bounds
    xy = rng.uniform((west, south), (east, north), (count, 2))
    back = transformer(grid.crs, "EPSG:4326")
    lon, lat = back.transform(*xy.T)
    rh = pool_over_disc(truth, pandas.DataFrame({"lon": lon, "lat": lat}), "p98", grid=grid).astype(float)
    seen = np.isfinite(rh)
    xy, rh = xy[seen], np.maximum(rh[seen] + rng.normal(0, NOISE_M, seen.sum()), 0)
    wrong = rng.random(len(rh)) < OUTLIERS
    rh[wrong] = rng.uniform(0, 60, wrong.sum())
    lon, lat = back.transform(*(xy + rng.normal(0, JITTER_M, xy.shape)).T)
    numbers = np.arange(len(rh), dtype=np.uint64)
    pandas.DataFrame({"shot_number": numbers, "lat": lat, "lon": lon, "rh_98": rh}).to_parquet(path)
    return len(rh)


def _row(site: str, result: dict[str, Any]) -> dict[str, Any]:
    names = {"map": "before", "+ gap": "usual", "scalar": "scalar", "spline": "spline"}
    row = {"site": site.split(" (")[0], "shots": result["held_out_shots"]}
    row |= {f"MAE {shown}": result[name]["mae_good_m"] for shown, name in names.items()}
    for name in ("before", "scalar", "spline"):
        row |= {f"lidar {k} {name}": result[name][f"pixel_{k.lower()}_m"] for k in ("MAE", "bias")}
    return row


if __name__ == "__main__":
    main()
