"""`canopy evaluate` and `canopy.evaluate`: lidar, GEDI shots, plots, benchmarks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import behaviour_support as support
import geopandas
import numpy as np
import pandas
import pytest
from pyproj import Transformer
from scipy import ndimage
from shapely.geometry import Point, box

PERCENTILES = r"p\d\d_error_m|shift|drop"
"""Of histograms of 1 cm in the recorded release; an exact percentile may lie half a bin or more away. The
shift is measured by correlation, to some centimetres."""
DISC_TOL_M = 0.02
"""Discs and plots pool the pixels whose centres they hold, or pixels by their share: both are right."""
PROMISED = "n mae_m rmse_m bias_m r2 block_r2 nmae edge_error cover_iou_2m by_height"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """map.tif: 200 x 250 m at 0.5 m with interval bands and a hole; lidar.tif at 1 m, a third of it missing;
    classes.tif, dem.tif; shots.csv and plots.gpkg with heights read off the truth."""
    folder = tmp_path_factory.mktemp("stand")
    _, chm = support.forest(400, 500, seed=5)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, chm.shape)
    height = np.maximum(ndimage.gaussian_filter(chm, 2) * 0.9 + 0.5 + noise, 0).astype(np.float32)
    height[50:90, 100:160] = np.nan
    bands = np.stack([height, np.maximum(height - 2, 0), height + 3])
    names = ("canopy_height", "height_lower", "height_upper")
    tags = {"CANOPY_INTERVAL": "0.9"}
    support.write_raster(folder / "map.tif", bands, nodata=float("nan"), names=names, tags=tags)
    lidar = chm.reshape(200, 2, 250, 2).mean(axis=(1, 3))
    lidar[:, 170:] = np.nan
    support.write_raster(folder / "lidar.tif", lidar, gsd=1.0, nodata=float("nan"))
    rows, cols = np.mgrid[:40, :50]
    support.write_raster(folder / "classes.tif", (1 + (cols > 20)).astype(np.uint8), gsd=5.0)
    support.write_raster(folder / "dem.tif", (100 + cols * 2.0 + rows**1.3).astype(np.float32), gsd=5.0)
    place(folder, chm, rng)
    return folder


def place(folder: Path, chm: np.ndarray, rng: np.random.Generator) -> None:
    """Shots and plots over true heights (h, w) of 0.5 m, written to `folder`."""
    x, y = support.WEST + rng.uniform(20, 230, 120), support.NORTH - rng.uniform(20, 180, 120)
    down, right = np.mgrid[: chm.shape[0], : chm.shape[1]] * 0.5 + 0.25
    away = [
        (right + support.WEST - a) ** 2 + (support.NORTH - down - b) ** 2 for a, b in zip(x, y, strict=True)
    ]
    top = np.array([np.percentile(chm[d <= 12.5**2], 98) for d in away])
    lon, lat = Transformer.from_crs(support.UTM, "EPSG:4326", always_xy=True).transform(x, y)
    pandas.DataFrame(
        {
            "shot_number": [str(19640000000000000 + i) for i in range(120)], "lat": lat, "lon": lon,
            "rh_95": top - 1.5, "rh_98": top + rng.normal(0, 1, 120), "sensitivity": rng.uniform(0.9, 1, 120),
            "beam_type": rng.choice(["full", "coverage"], 120),
        }
    ).to_csv(folder / "shots.csv", index=False)  # fmt: skip
    plots = geopandas.GeoDataFrame(
        {"top_height": [float(chm[d <= 100].mean()) for d in away[:40]], "site": ["a", "b"] * 20},
        geometry=[Point(*p) for p in zip(x[:40], y[:40], strict=True)], crs=support.UTM,
    )  # fmt: skip
    plots.to_file(folder / "plots.gpkg")
    plots.geometry = [box(p.x - 7.3, p.y - 7.1, p.x + 8.4, p.y + 6.9) for p in plots.geometry]
    plots.to_crs(4326).to_file(folder / "squares.geojson")


def brief(told: dict) -> dict:
    """A report without its notes, and of each stratum only some scores."""
    some = ("n", "mae_m", "bias_m", "r2", "cover_iou_2m")
    strata = {
        way: {part: {key: row[key]["value"] for key in some if key in row} for part, row in parts.items()}
        for way, parts in told["strata"].items()
    }
    parts = ("value", "ci95")
    overall = {key: {p: row[p] for p in parts if p in row} for key, row in told["overall"].items()}
    return told | {"strata": strata, "overall": overall}


def test_against_lidar(canopy, stand, tmp_path) -> None:
    words = ("evaluate", stand / "map.tif", "--reference", stand / "lidar.tif")
    by = f"height,cover,site,slope,kind={stand / 'classes.tif'}"
    told = canopy(*words, "--by", by, "--dem", stand / "dem.tif", "-o", "report", "--json").json
    assert told == json.loads((tmp_path / "report" / "metrics.json").read_text())
    support.check_report("evaluate_lidar", brief(told), skip=r"ci95|replicates|seed", loose=PERCENTILES)
    for name in PROMISED.split():
        assert set(told["overall"][name]) >= {"value", "ci95"}, name
    for name in ("mae_m", "rmse_m", "bias_m", "r2"):
        low, high = told["overall"][name]["ci95"]
        assert low < told["overall"][name]["value"] < high
    found = support.names_below(tmp_path / "report")
    wanted = {"metrics.json", "report.html"}
    wanted |= {f"by_{way}.csv" for way in ("height", "cover", "site", "slope", "kind")}
    assert wanted <= found and any(name.endswith(".png") for name in found)
    with (tmp_path / "report" / "by_height.csv").open() as file:
        rows = {row["height"]: row for row in csv.DictReader(file)}
    for name, row in told["overall"]["by_height"]["value"].items():
        if row["n"]:
            assert int(next(r for key, r in rows.items() if key.startswith(f"{name} "))["n"]) == row["n"]
    canopy(*words, "-o", "report", code=2)
    assert str(tmp_path) not in json.dumps(told), "no folders of anybody's machine"


def test_the_other_way_round_and_other_options(canopy, stand) -> None:
    """A coarser map against finer heights of another system; a floor; a planted shift."""
    support.warped(stand / "lidar.tif", stand / "utm17.tif", "EPSG:32617", 2.0)
    words = ("--floor-m", 2, "--replicates", 0, "--json")
    told = canopy("evaluate", stand / "utm17.tif", "--reference", stand / "lidar.tif", *words).json
    # Warped heights: the kernel may change, by centimetres.
    support.check_report(
        "evaluate_warped", brief(told)["overall"], skip=r"ci95|by_height.*\.n$",
        loose=r"_m\b|r2|edge|nmae|cover|\br\b", by=0.03,
    )  # fmt: skip
    with support.rasterio.open(stand / "lidar.tif") as dataset:
        heights = dataset.read(1)
    support.write_raster(stand / "moved.tif", heights, gsd=1.0, nodata=float("nan"), west=support.WEST + 3)
    told = canopy(f"evaluate {stand}/moved.tif --reference {stand}/lidar.tif --replicates 0 --json").json
    shift = told["shift_m"]
    assert abs(abs(shift["east"]) - 3) < 0.1 and abs(shift["north"]) < 0.1
    support.check_keys("evaluate_moved", shift)


@pytest.mark.parametrize(
    ("name", "reference", "words"),
    [
        ("gedi", "shots.csv", "--by beam_type,height"),
        ("gedi_rh95", "shots.csv", "--kind gedi --column rh_95"),
        ("plots", "plots.gpkg", "--by site"),
        ("plots_p95", "plots.gpkg", "--stat p95 --radius-m 8"),
        ("squares", "squares.geojson", "--kind plots"),
    ],
)
def test_against_samples(canopy, stand, tmp_path, name: str, reference: str, words: str) -> None:
    report = "-o report" if name == "gedi" else ""  # figures take their time
    told = canopy(f"evaluate {stand}/map.tif --reference {stand}/{reference} --json", words, report).json
    metres = r"_m\b|r2|nmae|cover|\br\b"
    support.check_report(f"evaluate_{name}", brief(told), loose=metres, by=DISC_TOL_M)
    assert not report or (tmp_path / "report" / "report.html").is_file()


def test_scores_are_plain_arithmetic(canopy, stand) -> None:
    """Independent of any recording: the means of NumPy on the coarser grid."""
    height = support.metres(stand / "map.tif").reshape(200, 2, 250, 2).mean(axis=(1, 3))
    lidar = support.metres(stand / "lidar.tif")
    known = np.isfinite(height) & np.isfinite(lidar)
    error = (height - lidar)[known].astype(float)
    told = canopy(f"evaluate {stand}/map.tif --reference {stand}/lidar.tif --json --replicates 0").json
    expected = {"n": known.sum(), "mae_m": np.abs(error).mean(), "bias_m": error.mean()}
    for key, value in (expected | {"rmse_m": np.sqrt((error**2).mean())}).items():
        assert told["overall"][key]["value"] == pytest.approx(float(value), rel=1e-5), key


def test_from_python(stand) -> None:
    import canopy

    scores = canopy.evaluate(stand / "map.tif", reference=stand / "lidar.tif", replicates=0)
    was = json.loads((support.GOLDENS / "evaluate_lidar.json").read_text())["values"]
    for name in ("n", "mae_m", "bias_m", "cover_iou_2m"):
        assert scores.overall[name].value == pytest.approx(was[f"overall.{name}.value"], rel=1e-6)
    with pytest.raises(canopy.InputError, match="no such file"):
        canopy.evaluate(stand / "none.tif", reference=stand / "lidar.tif")


# ---- benchmarks -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tiles in the layout of the data pack: images of 0.5 m, heights of 1 m in centimetres."""
    folder = tmp_path_factory.mktemp("pack")
    rows = [("a", "other", "Wood", "val"), ("b", "neon", "Plot", "val"), ("c", "other", "Far", "test"),
            ("d", "other", "Leafless", "test_hard")]  # fmt: skip
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "kind", "site", "split", "rgb_path", "chm_path"])
        for number, row in enumerate(rows):
            rgb, chm = support.forest(120, 120, seed=20 + number)
            north = support.NORTH + 1000 * number
            support.write_image(folder / f"{row[0]}_rgb.tif", rgb, north=north)
            cm = np.round(chm.reshape(60, 2, 60, 2).mean(axis=(1, 3)) * 100).astype(np.uint16)
            stored = {"gsd": 1.0, "nodata": 65535, "scale": 0.01}
            support.write_raster(folder / f"{row[0]}_chm.tif", cm, north=north, **stored)
            writer.writerow([*row, f"{row[0]}_rgb.tif", f"{row[0]}_chm.tif"])
    return folder


def test_a_benchmark(canopy, pack, model, tmp_path) -> None:
    words = f"evaluate --benchmark pack --model {model} --data-dir {pack} --backend torch --replicates 0"
    done = canopy(words, "-o out")
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {f"{row['model']}/{row['group']}": row for row in csv.DictReader(file)}
    support.check_keys("benchmark_rows", rows)
    # Predicted heights may move by centimetres.
    scores = ("n", "mae_m", "bias_m")
    numbers = {f"{name} {key}": float(row[key]) for name, row in rows.items() for key in scores}
    support.check_values("benchmark_rows", numbers, abs_=support.HEIGHT_TOL_M)
    assert "MAE m" in done.out and (tmp_path / "out" / "results.md").is_file()
    told = canopy(words, "--group val --json -o other").json
    support.check_keys("benchmark_json", told)
