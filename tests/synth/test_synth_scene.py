"""Scenes on disk: every file against the truth, checksums, tile sizes, and what must not be overwritten."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import laspy
import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rio_cogeo import cog_validate

from canopy.errors import InputError
from canopy.geo.grid import Grid
from canopy.imagery.named import DAY, DemoSource
from canopy.imagery.open import open_imagery
from canopy.runtime import NoProgress
from canopy.synth.forest import ROOF, TREE, WATER, SceneSpec
from canopy.synth.render import render, truth
from canopy.synth.scene import FILES, write_scene
from canopy.synth.sensors import BEAMS, CLASSES, COVERAGE, write_gedi, write_points

SIZE_M = 100.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "new" / "folder"
    write_scene(path, 5, SIZE_M, 0.5)
    return path


@pytest.fixture(scope="module")
def facts(folder) -> dict:
    return json.loads((folder / "scene.json").read_text())


@pytest.fixture(scope="module")
def village(tmp_path_factory) -> tuple[laspy.LasData, np.ndarray, np.ndarray, object]:
    """A point cloud of the corner of seed 0 with water, road and houses; rows, columns and truth of it."""
    path = tmp_path_factory.mktemp("village") / "points.laz"
    grid, origin = (
        Grid.of("EPSG:32619", [0.5, 0, 316_632, 0, -0.5, 4_884_496], (200, 200)),
        (316_000, 4_884_000),
    )
    counts = write_points(path, SceneSpec(), grid, origin, DAY, NoProgress())
    las = laspy.read(path)
    assert counts["total"] == len(las.points)
    rows, cols = (
        ((4_884_496 - np.asarray(las.y)) / 0.5).astype(int),
        ((np.asarray(las.x) - 316_632) / 0.5).astype(int),
    )
    return las, np.clip(rows, 0, 199), np.clip(cols, 0, 199), truth(SceneSpec(), 632, 496, 200, 200)


def test_scene_json_tells_the_truth_about_the_files(folder, facts):
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    for name, about in facts["files"].items():
        assert about["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert about["bytes"] == (folder / name).stat().st_size
    assert set(facts["files"]) == set(FILES) - {"scene.json"} and facts["spec"]["seed"] == 5
    shots = [s for s in facts["planted"]["gedi"]["shots"] if s["fault"] != "degraded"]
    assert shots and all(s["true_xy"] == s["reported_xy"] for s in shots)  # no jitter was asked for
    with rasterio.open(folder / "chm.tif") as dataset:
        chm = dataset.read(1)
        assert list(dataset.bounds) == facts["bounds"] and dataset.crs.to_string() == facts["crs"]
    planted = facts["planted"]
    assert planted["highest_m"] == pytest.approx(chm.max(), abs=1e-3)
    assert planted["mean_m"] == pytest.approx(chm.mean(), abs=2e-3)
    assert planted["cover"] == pytest.approx((chm >= 2).mean(), abs=1e-5) and planted["trees"] > 50
    assert sum(planted["surface_px"].values()) == chm.size


def test_rasters_are_cogs_with_the_rendered_pixels(folder, facts):
    whole = render(SceneSpec(seed=5), 600 - SIZE_M / 2, 440 + SIZE_M / 2, 200, 200)
    with rasterio.open(folder / "rgb.tif") as rgb, rasterio.open(folder / "chm.tif") as chm:
        np.testing.assert_array_equal(rgb.read(), whole.rgb)
        np.testing.assert_array_equal(chm.read(1), whole.chm)
        assert chm.dtypes == ("float32",) and chm.units == ("m",) and rgb.transform == chm.transform
        assert rgb.tags()["ACQUISITION_DATE"] == facts["date"]
    assert cog_validate(folder / "rgb.tif")[0] and cog_validate(folder / "chm.tif")[0]
    source = open_imagery(str(folder / "rgb.tif"))
    assert source.dates == (facts["date"],) and source.native_gsd_m == pytest.approx(0.5, rel=1e-3)


def test_points_hang_on_the_surface_and_the_ground(village):
    las, rows, cols, seen = village
    kind, number = np.asarray(las.classification), np.asarray(las.return_number)
    # Coordinates are whole centimetres: leave out points that this may have pushed over a pixel's edge.
    firm = np.all(
        [
            np.abs(v / 0.5 - np.rint(v / 0.5)) > 0.03
            for v in (np.asarray(las.x) - 316_632, np.asarray(las.y) - 4_884_496)
        ],
        0,
    )
    above = np.asarray(las.z) - seen.dtm[rows, cols]
    top = np.maximum(seen.chm, seen.roof)[rows, cols]
    first = firm & (number == 1) & (kind != 7)
    assert np.abs(above - top)[first].max() < 0.09
    ground = firm & (kind == 2)
    assert ground.sum() > 5000 and np.abs(above[ground]).max() < 0.09 and abs(above[ground].mean()) < 0.005
    assert (above <= top + 0.09)[firm & (kind != 7)].all()
    odd = above[kind == 7]
    assert len(odd) > 3 and ((odd > 20) | (odd < -5)).all()


def test_points_have_the_class_of_what_they_hit(village):
    las, rows, cols, seen = village
    kind, several = np.asarray(las.classification), np.asarray(las.number_of_returns)
    surface, height = seen.surface[rows, cols], np.asarray(las.z) - seen.dtm[rows, cols]
    assert set(np.unique(kind)) == set(CLASSES)
    for codes, want in (([9], WATER), ([6], ROOF), ([3, 5], TREE)):
        assert (surface[np.isin(kind, codes)] == want).mean() > 0.97
    assert height[kind == 5].min() > 1.5 and np.percentile(height[kind == 3], 98) < 2.1
    assert several.max() == 3 and (np.asarray(las.return_number) <= several).all()


@pytest.fixture(scope="module")
def gedi(tmp_path_factory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("gedi") / "gedi.h5"
    scene = DemoSource(SceneSpec(seed=2, gsd_m=1.0), 900)
    facts = write_gedi(path, scene.spec, scene.native_grid, scene.origin_xy, DAY, 8.0, NoProgress())
    return path, facts


def _columns(path: Path, *names: str) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: np.concatenate([file[beam][name][()] for beam in BEAMS]) for name in names}


def test_gedi_file_has_the_layout_of_level_2a(gedi):
    path, facts = gedi
    with h5py.File(path) as file:
        assert set(file) == set(BEAMS)
        for name, beam in file.items():
            assert ("Coverage" in beam.attrs["description"]) == (name in COVERAGE)
            assert beam["shot_number"].dtype == np.uint64 and beam["rh"].shape[1] == 101
            lengths = {len(beam[v]) for v in beam if isinstance(beam[v], h5py.Dataset)}
            assert lengths == {len(beam["geolocation/sensitivity_a2"])} and lengths != {0}
            assert len(beam["land_cover_data/urban_proportion"]) in lengths
    columns = "shot_number", "delta_time", "quality_flag", "degrade_flag", "sensitivity"
    got = _columns(path, *columns, "elev_lowestmode", "digital_elevation_model")
    assert got["shot_number"].min() > 2**53  # a float would lose digits
    assert sorted(map(str, got["shot_number"].tolist())) == sorted(s["shot_number"] for s in facts["shots"])
    assert len(set(got["shot_number"].tolist())) == facts["count"] > 100
    years = got["delta_time"] / 86_400 / 365.25
    assert (years > 6.4).all() and (years < 6.8).all()
    assert (got["quality_flag"] == 0).sum() == facts["faults"]["quality_0"] > 3
    assert (got["degrade_flag"] == 1).sum() == facts["faults"]["degraded"] > 1
    assert (got["sensitivity"] < 0.95).sum() == facts["faults"]["insensitive"] > 3
    off = np.abs(got["elev_lowestmode"] - got["digital_elevation_model"])
    assert np.median(off[got["quality_flag"] == 0]) > 5 > np.median(off[got["quality_flag"] == 1])


def test_gedi_heights_are_percentiles_of_the_true_disc(gedi):
    path, facts = gedi
    spec = SceneSpec(seed=2, gsd_m=1.0)
    got = _columns(path, "shot_number", "rh", "elev_lowestmode", "lat_lowestmode", "lon_lowestmode")
    row_of = {str(n): k for k, n in enumerate(got["shot_number"].tolist())}
    whole = truth(spec, 150, 890, 900, 900)
    origin = DemoSource(spec, 900).origin_xy
    to_utm = Transformer.from_crs(4326, 32619, always_xy=True)
    moved = []
    for shot in facts["shots"]:
        k = row_of[shot["shot_number"]]
        reported = to_utm.transform(got["lon_lowestmode"][k], got["lat_lowestmode"][k])
        np.testing.assert_allclose(reported, shot["reported_xy"], atol=2e-3)
        x, y = np.subtract(shot["true_xy"], origin)
        top, left = int(890 - y) - 13, int(x - 150) - 13
        assert top >= 0 and left >= 0 and max(top, left) + 27 <= 900  # a whole disc, inside the scene
        near = np.s_[top : top + 27, left : left + 27]
        rows, cols = np.mgrid[near]
        disc = np.hypot(150 + cols + 0.5 - x, 890 - rows - 0.5 - y) <= 12.5
        ground, true = whole.dtm[near][disc], np.sort(whole.chm[near][disc])
        if shot["fault"] in ("", "degraded"):
            rh = got["rh"][k]
            assert rh[100] == pytest.approx(true[-1], abs=1e-4)
            assert (
                true[int(0.97 * len(true)) - 1] - 1e-4
                <= rh[98]
                <= true[min(int(0.99 * len(true)) + 1, len(true) - 1)]
            )
            assert (np.diff(rh) >= 0).all() and rh[0] >= 0
            assert got["elev_lowestmode"][k] == pytest.approx(ground.mean(), abs=0.01)
        if shot["fault"] == "":
            moved.append(np.subtract(shot["reported_xy"], shot["true_xy"]))
    assert np.std(moved) == pytest.approx(8.0, rel=0.2) and abs(np.mean(moved)) < 2.0


def test_a_fault_leaves_nothing_behind(tmp_path):
    class Stop(NoProgress):
        def __init__(self, after: int) -> None:
            self.left = after

        def advance(self, steps: int = 1) -> None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("pulled the plug")

    for after in (0, 2):
        with pytest.raises(RuntimeError, match="plug"):
            write_scene(tmp_path / "new", 1, 60.0, 1.0, progress=Stop(after))
        assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "chm.tif").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        write_scene(tmp_path / "old", 1, 60.0, 1.0)
    with pytest.raises(RuntimeError, match="plug"):
        write_scene(tmp_path / "old", 1, 60.0, 1.0, progress=Stop(2), overwrite=True)
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["chm.tif"]
    write_scene(tmp_path / "old", 1, 60.0, 1.0, overwrite=True)
    with rasterio.open(tmp_path / "old" / "chm.tif") as dataset:
        assert dataset.shape == (60, 60)
