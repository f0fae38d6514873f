"""`canopy data`: heights from lidar, shots from GEDI granules, chips, and the synthetic forest."""

from __future__ import annotations

import json
from pathlib import Path

import behaviour_support as support
import geopandas
import h5py
import laspy
import numpy as np
import pandas
import pytest
import rasterio
from pyproj import CRS, Transformer
from safetensors.numpy import load_file


# ---- the synthetic forest ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`canopy data synth` of 120 m; what it printed is in told.json beside it."""
    folder = tmp_path_factory.mktemp("synth")
    words = ("data", "synth", "-o", "scene", "--seed", 7, "--size-m", 120, "--gedi-jitter-m", 5, "--json")
    (folder / "told.json").write_text(support.run(folder, *words).out)
    return folder / "scene"


def test_the_synthetic_forest_stays_the_same(scene) -> None:
    told = json.loads((scene.parent / "told.json").read_text())
    assert support.names_below(scene) == {"rgb.tif", "chm.tif", "points.laz", "gedi.h5", "scene.json"}
    assert told.keys() == json.loads((scene / "scene.json").read_text()).keys()
    support.check_report("synth", {**told, "files": sorted(told["files"])}, skip="bytes")
    for name in ("rgb", "chm"):
        support.check_grid(f"synth_{name}", scene / f"{name}.tif")
    support.check_heights("synth_chm", support.metres(scene / "chm.tif"), stride=8, tol_m=0.001)
    with rasterio.open(scene / "rgb.tif") as image:
        for band, values in enumerate(image.read()):
            # Grey levels; one may be rounded the other way.
            support.check_heights(f"synth_rgb_{band}", values.astype(float), stride=8, tol_m=1)
    cloud = laspy.read(scene / "points.laz")
    facts = {str(c): int((np.asarray(cloud.classification) == c).sum()) for c in range(19)}
    places = {axis: float(np.asarray(getattr(cloud, axis)).mean()) for axis in "xyz"}
    support.check_values("synth_points", {"points": len(cloud.points), **facts, **places}, rel=1e-7)
    with h5py.File(scene / "gedi.h5") as file:
        beams = {name: beam for name, beam in file.items() if "rh" in beam}
        shots = {f"{name} {key}": beam[key][()].tolist() for name, beam in beams.items() for key in COLUMNS}
        shots |= {f"{name} rh": beam["rh"][:, ::25].ravel().tolist() for name, beam in beams.items()}
    support.check_values("synth_gedi", shots, rel=1e-6, abs_=1e-3)


COLUMNS = "shot_number", "lat_lowestmode", "lon_lowestmode", "quality_flag", "sensitivity"


# ---- lidar ------------------------------------------------------------------------------------
def test_heights_from_a_point_cloud(canopy, scene, tmp_path) -> None:
    told = canopy("data", "chm", scene / "points.laz", "-o", "chm.tif", "--json", "--workers", 1).json
    support.check_keys("chm_points", told)
    support.check_grid("chm_points", tmp_path / "chm.tif")
    # The terrain between ground returns is a triangulation: which of two equal diagonals is taken may change.
    support.check_heights("chm_points", support.metres(tmp_path / "chm.tif"), stride=3, share=0.99)
    truth = support.metres(scene / "chm.tif").reshape(120, 2, 120, 2).max(axis=(1, 3))
    found = support.metres(tmp_path / "chm.tif")
    assert found.shape == truth.shape and np.nanmean(np.abs(found - truth)) < 1.5
    canopy("data", "chm", scene / "points.laz", "-o", "chm.tif", code=2)


def test_cloth_ground_and_other_wishes(canopy, scene, tmp_path) -> None:
    west, south = rasterio.open(scene / "chm.tif").bounds[:2]
    area = ("--bounds", f"{west + 20},{south + 20},{west + 80},{south + 70}", "--bounds-crs", "EPSG:32619")
    words = ("--ground", "csf", "--gsd", 0.5, "--pit-width-m", 2, "--fill-px", 2, "--buildings", "mask")
    canopy("data", "chm", scene / "points.laz", *area, *words, "-o", "chm.tif", "--workers", 1)
    support.check_grid("chm_cloth", tmp_path / "chm.tif")
    support.check_heights("chm_cloth", support.metres(tmp_path / "chm.tif"), share=0.97)


def test_classes_and_units(canopy, tmp_path) -> None:
    """Level ground in feet with a tree, a roof and a pond: known heights, no recording needed."""
    step = np.arange(0.25, 40, 0.5)
    x, y = (a.ravel() for a in np.meshgrid(step, step))
    tree, roof, pond = (np.hypot(x - a, y - b) < 4 for a, b in ((10, 10), (30, 10), (10, 30)))
    z = (100 + np.where(tree, 8.0, 0) + np.where(roof, 5.0, 0)) / 0.3048
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales, header.offsets = np.full(3, 0.001), np.array([500_000, 4_880_000, 0.0])
    header.add_crs(CRS.from_epsg(32619))
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = x + 500_000, y + 4_880_000, z
    cloud.classification = np.select([tree, roof, pond], [5, 6, 9], 2).astype(np.uint8)
    cloud.return_number = cloud.number_of_returns = np.ones(len(x), np.uint8)
    cloud.write(str(tmp_path / "c.laz"))
    canopy("data", "chm", "c.laz", "-o", "chm.tif", "--units", "ft", "--water", "mask")
    with rasterio.open(tmp_path / "chm.tif") as made:
        assert made.descriptions == ("canopy_height", "point_density", "valid")
    height = support.metres(tmp_path / "chm.tif")
    assert height.shape == (40, 40)
    assert height[30, 10] == pytest.approx(8, abs=0.02) and height[30, 30] == 0 and height[5, 35] == 0
    assert np.isnan(height[10, 10])


def test_heights_from_surface_and_terrain(canopy, tmp_path) -> None:
    _, chm = support.forest(120, 150, seed=6, gsd_m=1.0)
    rows, cols = np.mgrid[:120, :150]
    terrain = (200 + 0.1 * cols + 0.05 * rows).astype(np.float32)
    surface = terrain + chm
    surface[10:20, 30:60] = -9999
    support.write_raster(tmp_path / "dsm.tif", surface, gsd=1.0, nodata=-9999)
    support.write_raster(tmp_path / "dtm.tif", terrain[::2, ::2], gsd=2.0, nodata=-9999)
    pair = ("--dsm", "dsm.tif", "--dtm", "dtm.tif")
    told = canopy("data", "chm", *pair, "-o", "chm.tif", "--json").json
    support.check_keys("chm_surfaces", told)
    support.check_heights("chm_surfaces", support.metres(tmp_path / "chm.tif"), stride=3)
    canopy("data", "chm", *pair, "-o", "two.tif", "--gsd", 2, "--units", "us-ft")
    support.check_heights("chm_surfaces_2m", support.metres(tmp_path / "two.tif"), stride=2)
    support.write_raster(tmp_path / "low.tif", terrain - 9, gsd=1.0)
    swapped = ("--dsm", "low.tif", "--dtm", "dtm.tif", "-o", "o.tif")
    assert "Swap" in canopy("data", "chm", *swapped, code=2).error_line


# ---- GEDI -------------------------------------------------------------------------------------
@pytest.fixture
def granule(tmp_path: Path) -> Path:
    """200 shots near Frankfort, Kentucky; some poor, degraded, insensitive, over water or town."""
    rng = np.random.default_rng(11)
    rh = np.sort(rng.uniform(0, 30, (200, 101)), axis=1)
    flags = {
        "quality_flag": (np.arange(200) % 5 > 0).astype(np.uint8),
        "degrade_flag": (np.arange(200) % 17 == 0).astype(np.uint8),
        "sensitivity": rng.uniform(0.9, 1.0, 200).astype(np.float32),
        "land_cover_data/landsat_water_persistence": (np.arange(200) % 23 == 0).astype(np.uint8) * 80,
        "land_cover_data/urban_proportion": (np.arange(200) % 29 == 0).astype(np.uint8) * 90,
    }
    lon, lat = -84.5 + rng.uniform(0, 0.1, 200), 38.0 + rng.uniform(0, 0.1, 200)
    return support.write_granule(tmp_path / "GEDI02_A_2021187.h5", lon, lat, rh, **flags)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("strict", ()),
        ("all", ("--filter", "none", "--rh", "10,50,98")),
        ("area", ("--bbox", "38.05,-84.45", "--size-m", 4000)),
    ],
)
def test_shots(canopy, granule, tmp_path, name: str, words: tuple[object, ...]) -> None:
    told = canopy("data", "gedi", granule, "-o", "shots.parquet", *words, "--json").json
    support.check_keys(f"gedi_{name}", told)
    shots = geopandas.read_parquet(tmp_path / "shots.parquet")
    assert len(shots) == told["shots"]["kept"] and shots.crs is not None
    assert np.allclose(shots.geometry.x, shots.lon) and np.allclose(shots.geometry.y, shots.lat)
    table = shots.sort_values("shot_number").iloc[::7]
    columns = [c for c in table.columns if c.startswith("rh_")] + ["lat", "lon", "sensitivity"]
    found = {column: [float(v) for v in table[column]] for column in columns}
    found["shots"] = [str(v) for v in table.shot_number]
    support.check_values(f"gedi_{name}", {**found, "columns": sorted(shots.columns), "n": len(shots)})


def test_a_published_granule(canopy, shared, tmp_path) -> None:
    files = sorted((shared / "data" / "gedi").glob("*.h5"))
    assert files, "the data pack has lost its granules"
    told = canopy("data", "gedi", files[-1], "--filter", "none", "-o", "s.parquet", "--json").json
    support.check_values("gedi_published", {"file": files[-1].name, **told["shots"]})


# ---- chips ------------------------------------------------------------------------------------
def test_chips(chips) -> None:
    told = json.loads((chips.parent / "told.json").read_text())
    support.check_keys("chips", told)
    assert told["chips"] == 12
    found = support.names_below(chips)
    assert {"shards", "index.csv", "index.parquet", "summary.json"} <= found
    index = pandas.read_csv(chips / "index.csv").sort_values("id")
    wanted = "id pair site kind split row col height_px width_px gsd_m label_gsd_m"
    rows = {column: index[column].tolist() for column in wanted.split()}
    # The last part of a name is a hash of the settings, which may grow.
    rows["id"] = [name.rsplit("-", 1)[0] for name in rows["id"]]
    support.check_values("chips", {**rows, "columns": sorted(index.columns)})
    heights = {column: index[column].tolist() for column in ("height_mean_m", "height_p95_m")}
    support.check_values("chips_heights", heights, abs_=0.02)
    first = index.iloc[0]
    tensors = load_file(chips / str(first["shard"]))
    rgb, chm = tensors[f"{first['id']}/rgb"], tensors[f"{first['id']}/chm"]
    assert (rgb.dtype, chm.dtype) == (np.uint8, np.uint16)
    assert rgb.shape[1:] == (2 * chm.shape[0], 2 * chm.shape[1])
    support.check_heights("chips_chm", np.where(chm == 65535, np.nan, chm / 100.0))
    support.check_heights("chips_rgb", rgb[1].astype(float), tol_m=1)


def test_a_shifted_label_is_put_back(canopy, tmp_path) -> None:
    """Labels 4 m east of their trees: the shift is found, and undone where it is sure."""
    rgb, chm = support.forest(256, 256, seed=77)
    support.write_image(tmp_path / "a.tif", rgb)
    labels = chm.reshape(128, 2, 128, 2).mean(axis=(1, 3))
    support.write_raster(tmp_path / "b.tif", labels, gsd=1.0, west=support.WEST + 4, nodata=float("nan"))
    (tmp_path / "m.csv").write_text("rgb_path,chm_path,split\na.tif,b.tif,train\n")
    words = "data chips --manifest m.csv -o out"
    canopy(words)
    row = pandas.read_csv(tmp_path / "out" / "index.csv").iloc[0]
    assert abs(row["shift_right_m"]) == pytest.approx(4, abs=1) and abs(row["shift_down_m"]) < 1
    assert "--overwrite" in canopy(words, "--size-px 64", code=2).error_line
    told = canopy(words, "--json").json
    assert told["cut_now"] == 0, "nothing is cut twice"


def test_a_damaged_label_exits_3(canopy, tmp_path) -> None:
    for name in ("a", "b"):
        rgb, chm = support.forest(128, 128, seed=ord(name))
        support.write_image(tmp_path / f"{name}.tif", rgb)
        support.write_raster(tmp_path / f"{name}_chm.tif", chm, nodata=float("nan"))
    damaged = tmp_path / "b_chm.tif"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    rows = "id,rgb_path,chm_path,split", "a,a.tif,a_chm.tif,train", "b,b.tif,b_chm.tif,train"
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    ran = canopy("data", "chips", "--manifest", "m.csv", "-o", "out", "--no-register", code=3)
    assert "index.csv" in ran.error_line


def test_synthetic_chips(canopy, tmp_path) -> None:
    canopy("data", "chips", "--synth", 2, "--size-px", 64, "--seed", 5, "-o", "out")
    index = pandas.read_csv(tmp_path / "out" / "index.csv")
    found = {column: index[column].tolist() for column in ("id", "height_mean_m", "cover")}
    support.check_values("chips_synth", found, rel=1e-3)


def test_places_are_where_they_were(scene) -> None:
    """The scene's outline in degrees, by another library than canopy's."""
    told = json.loads((scene / "scene.json").read_text())
    x, y = Transformer.from_crs(4326, 32619, always_xy=True).transform(*told["origin_lat_lon"][::-1])
    assert (x, y) == pytest.approx(tuple(told["origin_xy"]), abs=0.02)
