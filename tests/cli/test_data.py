"""`canopy data`: what is said, odd inputs that survive, and refusals; tests/behaviour has what comes out."""

from __future__ import annotations

import builtins
import json
import random
from pathlib import Path

import h5py
import laspy
import numpy as np
import pytest
import rasterio
from pyproj import CRS

from canopy.geo.grid import quadkey_bounds

NAME = "NEON_D01_HARV_DP3_732000_4713000_CHM.tif"
HERE = ("--bbox", "42.5369,-72.1727", "--size-m", "300")
METRE = rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000)


# ---- sources ----------------------------------------------------------------------------------
def test_get_asks_about_much_and_says_how_to_cite(canopy, refused, server, point_at, tmp_path) -> None:
    point_at("neon", f"{server.url}/api")
    body = random.Random(1).randbytes(3000)
    row = {"name": NAME, "size": len(body), "url": server.put(f"/files/{NAME}", body)}
    sites = [{"siteCode": "HARV", "availableMonths": ["2022-08"]}]
    server.put("/api/products/DP3.30015.001", {"data": {"siteCodes": sites}})
    server.put("/api/data/DP3.30015.001/HARV/2022-08", {"data": {"files": [row]}})
    words = ("data", "get", "neon", *HERE, "-o", "out")
    listed = canopy(*words, "--dry-run").out
    assert f"3.0 kB  HARV-2022-08/{NAME}  2022-08" in listed and "1 files, 3.0 kB; CC0 1.0" in listed
    assert canopy(*words, "--max-gb", "0.000001").code == 2 and not (tmp_path / "out").exists()
    row.pop("size")  # then it is the usual size of such files that is known: no reason to refuse
    server.put("/api/data/DP3.30015.001/HARV/2022-08", {"data": {"files": [row]}})
    assert canopy(*words, "--max-gb", "0.000001", "--dry-run").code == 0
    assert "1 fetched, 0 kept; cite: NEON (National" in canopy(*words, "--max-gb", "0.000001", "--yes").out


def test_a_published_map_is_cut_by_area_into_one_file(canopy, refused, server, point_at, tmp_path) -> None:
    key, px = "0230102120", 256
    west, _, east, north = quadkey_bounds(key)
    place = rasterio.Affine((east - west) / px, 0, west, 0, (west - east) / px, north)
    with rasterio.open(
        tmp_path / "tile.tif", "w", driver="GTiff", width=px, height=px, count=1, dtype="uint8",
        crs="EPSG:3857", transform=place, nodata=255,
    ) as tile:  # fmt: skip
        tile.write(np.full((1, px, px), 7, np.uint8))
    server.put(f"/v2/chm/{key}.tif", (tmp_path / "tile.tif").read_bytes())
    point_at("meta-v2", f"{server.url}/v2")
    x, y = place @ (100, 100)
    words = (
        "data",
        "get",
        "meta-v2",
        "--bounds",
        f"{x},{y - 5000},{x + 5000},{y}",
        "--bounds-crs",
        "EPSG:3857",
    )
    assert "1 tiles; CC BY 4.0" in canopy(*words, "-o", "cut.tif", "--dry-run").out
    assert not (tmp_path / "cut.tif").exists()
    told = canopy(*words, "-o", "cut.tif").out
    assert "100.0% valid, images of ?" in told and "cite: Brandt" in told
    with rasterio.open(tmp_path / "cut.tif") as cut:
        assert (cut.read(1) == 700).all() and (cut.read(2) == 0).all() and cut.scales[0] == 0.01
    assert "exists already" in refused(*words, "-o", "cut.tif")
    assert "cut by area alone. Leave --site out" in refused(*words, "-o", "a.tif", "--site", "HARV")
    assert "cut by area; expected --bbox" in refused("data", "get", "meta-v2", "-o", "a.tif")
    assert "a.laz" in refused(*words, "-o", "a.laz")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("naip", "licence: public domain"),
        ("tree", "flight_site: STEI"),
        ("BLAN", "flight_crs: EPSG:32617"),
        (NAME, "- 732000\n- 4713000\n- 733000\n- 4714000\n"),
    ],
)
def test_describe_prints_facts_of_sources_sites_and_tiles(canopy, name, expected) -> None:
    assert expected in canopy("data", "describe", name).out


def test_verify_checks_manifests(canopy, point_at) -> None:
    point_at("neon", "https://data.neonscience.org/api/v0", licenze="x")
    assert "licenze" in canopy("data", "verify", "neon").error_line
    assert canopy("data", "verify", "gedi-l2a").out == "valid: gedi-l2a\n"


@pytest.mark.parametrize(
    "words", [("synth", "-o", "s", "--size-m", "20"), ("gedi", "a.h5", "-o", "s.parquet")]
)
def test_a_missing_library_is_named_with_its_remedy(refused, monkeypatch, words) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("no h5py", name="h5py")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'canopy-height[gedi]'" in refused("data", *words)


# ---- heights from lidar -----------------------------------------------------------------------
@pytest.fixture
def pair(make_image):
    """`pair(dsm, dtm, ...)`: words for two rasters of 20 x 30 m; numbers stand for level ones."""

    def words(top: object, ground: object, **given: object) -> tuple[object, ...]:
        files = [
            make_image(
                f"{name}.tif",
                np.broadcast_to(np.float32(value), (1, 20, 30)).copy(),
                transform=METRE,
                **given,
            )
            for name, value in (("dsm", top), ("dtm", ground))
        ]
        return ("data", "chm", "--dsm", files[0], "--dtm", files[1], "-o", "o.tif")

    return words


def test_impossible_heights_and_gaps_have_no_height(canopy, heights, pair) -> None:
    top = np.full((20, 30), 112.0)
    top[:, :10], top[5, 5], top[0, 0] = 99.5, -9999, 900.0
    assert canopy(*pair(top, 100.0, nodata=-9999)).code == 0
    height = heights("o.tif")
    assert height[7, 20] == 12 and height[7, 2] == 0, "just below the ground is the ground"
    assert np.isnan(height[5, 5]) and np.isnan(height[0, 0]) and np.isfinite(height).sum() == 598
    assert canopy(*pair(top, 100.0, nodata=-9999), "--units", "ft", "--overwrite").code == 0
    assert heights("o.tif")[7, 20] == pytest.approx(12 * 0.3048, abs=1e-3)


@pytest.mark.parametrize("fill", [-9999.0, float(np.finfo(np.float32).min), 32767.0, 0.0])
def test_undeclared_nodata_in_both_is_no_terrain_of_0_m(canopy, heights, pair, fill) -> None:
    top, ground = np.full((20, 30), 112.0), np.full((20, 30), 100.0)
    top[:, :10] = ground[:, :10] = fill
    ran = canopy(*pair(top, ground))
    assert ran.code == 0
    if fill == 0:  # which may be the sea
        assert "both exactly 0 m in 33%" in ran.err
    else:
        assert np.isnan(heights("o.tif")[:, :10]).all() and heights("o.tif")[5, 20] == 12


def write_cloud(path: Path, kind: int = 2, crs: str | None = "EPSG:32619") -> bytes:
    """20 m of level ground, or whatever else the class is, two points a metre."""
    x, y = (a.ravel() for a in np.meshgrid(np.arange(0.25, 20, 0.5), np.arange(0.25, 20, 0.5)))
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales, header.offsets = np.full(3, 0.01), np.array([500_000, 4_880_000, 0.0])
    if crs is not None:
        header.add_crs(CRS.from_user_input(crs))
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = 500_000 + x, 4_880_000 + y, np.full(len(x), 100.0)
    cloud.classification = np.full(len(x), kind, np.uint8)
    cloud.write(str(path))
    return path.read_bytes()


def test_lidar_that_cannot_be_used(refused, make_image, tmp_path) -> None:
    (tmp_path / "cut.laz").write_bytes(write_cloud(tmp_path / "c.laz")[:1500])
    (tmp_path / "empty.laz").write_bytes(b"")
    write_cloud(tmp_path / "bare.laz", crs=None)
    write_cloud(tmp_path / "air.laz", 5)
    level = np.full((1, 20, 30), 100, np.float32)
    make_image("bare.tif", level, transform=METRE, crs=None)
    make_image("far.tif", level, transform=rasterio.Affine.translation(900, 0) @ METRE)
    make_image("near.tif", level, transform=METRE)
    for name, crs in (("navd", "32617+5703"), ("egm", "32617+5773"), ("wgs", "4979"), ("geoid", "4326+5773")):
        make_image(f"{name}.tif", level, transform=METRE, crs=f"EPSG:{crs}")
    for words, says in (
        ("cut.laz", "cut.laz"),
        ("empty.laz", "empty.laz"),
        ("bare.laz", "--crs"),
        ("bare.laz --crs EPSG:2154", "--crs"),
        ("air.laz --ground class", "no ground points"),
        ("c.laz --ground x", "--ground: 'x'; expected 'auto', 'class' or 'csf'"),
        ("c.laz --gsd 0", "--gsd: 0.0; expected greater than or equal to 0.1"),
        ("c.laz --bbox 0,0 --size-m 10", "no data in the area"),
        ("", "no point cloud"),
        ("--dsm far.tif", "both"),
        ("--dsm near.tif --dtm far.tif", "overlap"),
        ("--dsm navd.tif --dtm egm.tif", "same vertical datum"),
        ("--dsm wgs.tif --dtm geoid.tif", "same vertical datum"),
        ("--dsm bare.tif --dtm far.tif", "--input-crs"),
        ("--dsm far.tif --dtm none.tif", "no such file"),
        ("c.laz --dsm far.tif --dtm far.tif", "one or the other"),
        ("--dsm far.tif --dtm far.tif --fill-px 3 --water keep", "Leave --water, --fill-px out"),
    ):
        assert says in refused("data", "chm", *words.split(), "-o", "o.tif"), words


# ---- GEDI -------------------------------------------------------------------------------------
@pytest.fixture
def granule(tmp_path: Path) -> Path:
    """Forty shots near Frankfort, Kentucky, on two beams; one in four is bad."""
    zero = np.zeros(20, np.uint8)
    columns = {
        "shot_number": np.arange(20, dtype=np.uint64) + np.uint64(2**60 + 1),
        "lat_lowestmode": 38.0 + 0.001 * np.arange(20), "lon_lowestmode": np.full(20, -84.5),
        "rh": np.tile(np.arange(101, dtype=np.float32) / 4, (20, 1)), "delta_time": np.arange(20.0),
        "quality_flag": (np.arange(20) % 4 > 0).astype(np.uint8), "degrade_flag": zero,
        "sensitivity": np.full(20, 0.99, np.float32), "land_cover_data/landsat_water_persistence": zero,
        "land_cover_data/urban_proportion": zero,
    }  # fmt: skip
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for beam in ("BEAM0001", "BEAM1000"):
            for name, values in columns.items():
                file[f"{beam}/{name}"] = values
    return tmp_path / "a.h5"


def test_shots_are_counted_and_a_dry_run_stops_at_the_area(canopy, granule, tmp_path) -> None:
    words = ("data", "gedi", granule, "-o", "s.parquet")
    ran = canopy(*words, "--bounds", "-84.6,37.9,-84.4,38.1", "--dry-run")
    assert ran.code == 0 and "37.90-38.10 N, 84.60-84.40 W" in ran.out and "40 shots" in ran.out
    told = canopy(*words, "--dry-run", "--json").out
    assert json.loads(told)["shots"] == {"in_files": 40} and not (tmp_path / "s.parquet").exists()
    ran = canopy(*words, "--rh", "50, 95,98")
    assert ran.code == 0 and "30 of 40 shots" in ran.out and "quality_flag 10" in ran.out
    assert "note: a.h5: no sensitivity_a2" in ran.err


# ---- chips ------------------------------------------------------------------------------------
@pytest.fixture
def manifest(make_image, tmp_path) -> Path:
    rng = np.random.default_rng(0)
    # Detail down to the pixel: the smooth picture other tests use is rejected as blurred, and rightly.
    make_image("rgb.tif", rng.integers(60, 180, (3, 100, 120)).astype(np.uint8))
    # Blocks of 8 m without structure: random heights are not judged against the picture.
    make_image("chm.tif", rng.uniform(3, 20, (1, 50, 60)).astype(np.float32), transform=METRE)
    (tmp_path / "manifest.csv").write_text("rgb_path,chm_path,split\nrgb.tif,chm.tif,train\n")
    return tmp_path / "manifest.csv"


def test_chips_say_what_was_cut_and_a_file_is_the_id_of_its_pair(canopy, manifest, tmp_path) -> None:
    words = ("data", "chips", "--manifest", "manifest.csv", "-o", "out", "--no-register")
    ran = canopy(*words)
    assert "no val chips" in ran.err  # one image is one block, and cannot be split
    assert ran.code == 0 and "1 chips, 0 rejected" in ran.out and "1 of 1 shards cut now" in ran.out
    assert ",rgb," in (tmp_path / "out" / "index.csv").read_text()
    assert canopy(*words, "-q").out == ""


# ---- refusals ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("get neon --datetime soon --bbox 42.5,-72.2 --size-m 300", "--datetime"),
        ("get france-lidar-hd --site HARV --bbox 42.5,-72.2", "sites are NEON's. Leave --site out"),
        ("get sao-paulo --match 3314", "is found by area; expected --bbox"),
        *((f"synth {option} {value}", option) for option, value in (
            ("--size-m", 0), ("--size-m", "nan"), ("--size-m", 1e7), ("--gsd", 0.05), ("--gsd", 6),
            ("--seed", -1), ("--gedi-jitter-m", -1),
        )),
        ("gedi a.h5 --bbox 10,10 --size-m 900", "none of 40 shots"),
        ("gedi a.h5 --bounds 37.9,-84.6,38.1,-84.4", "swapped"),
        ("gedi a.h5 --size-m 900", "--bbox"),
        ("gedi a.h5 --rh 95,high", "--rh"),
        ("gedi a.h5 --rh 101", "--rh"),
        ("gedi a.h5 --filter best", "strict, loose, none"),
        ("gedi a.h5 a.h5", "given twice"),
        ("gedi a.h5 --l2b a.h5", "cover"),
        ("chips --manifest manifest.csv --size-px 33", "--size-px: 33; expected a multiple of 2"),
        ("chips --manifest manifest.csv --label-rule median", "'mean' or 'max'"),
        ("chips --manifest manifest.csv --max-shift-m 99", "shift"),
        ("chips --manifest manifest.csv --val 0.6 --test 0.6", "train"),
        ("chips --manifest manifest.csv --hold-out WLOU", "WLOU"),
        ("chips --manifest manifest.csv --workers 0", "workers"),
        ("chips --manifest none.csv", "none.csv"),
        ("chips --synth 1 --gsd 1 --no-register --val 0.1", "Leave --gsd, --no-register, --val out"),
    ],
)  # fmt: skip
def test_bad_wishes_are_one_line(refused, granule, manifest, words: str, says: str) -> None:
    assert says in refused("data", *words.split(), "-o", "s.parquet" if words.startswith("gedi") else "out")
