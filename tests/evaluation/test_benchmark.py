"""Benchmarks: strict manifests, scenes in folders, pooled scores, the audit and the table."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import rasterio
import yaml

from canopy.config import manifest_names
from canopy.errors import AreaError, ConfigError, DataError, InputError
from canopy.evaluation.benchmark.manifest import benchmark, scenes_of
from canopy.evaluation.benchmark.run import Judged, append_rows, audit_lines, markdown, rows_of, run_benchmark
from canopy.evaluation.opening import open_heights
from canopy.runtime import manifests_dir

NAMES = ["california", "france", "neon-test", "open-canopy", "pack", "sao-paulo"]
OURS = Judged("default", "ab" * 32, ("default", "canopy-lite"))


@pytest.fixture
def manifests(tmp_path, monkeypatch):
    """A copy of data_manifests that a test may spoil: `manifests("pack", metrics=[...])` rewrites one."""
    root = tmp_path / "manifests"
    shutil.copytree(manifests_dir(), root)
    monkeypatch.setenv("CANOPY_MANIFESTS", str(root))

    def change(name, /, **fields):
        path = root / "benchmarks" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields, sort_keys=False))

    return change


@pytest.fixture
def pack(tmp_path, forest, write_map):
    """A small folder of the pack's layout: two tiles of two sites, a plot, a test tile, a training tile."""
    rows = [("a", "other", "Wood", "val"), ("b", "other", "Hill", "val"), ("c", "neon", "Plot", "val"),
            ("d", "other", "Far", "test"), ("e", "other", "Wood", "train")]  # fmt: skip
    for seed, (name, *_) in enumerate(rows):
        cm = (forest(100, seed) * 100).round().astype(np.uint16)
        write_map(f"pack/chm/{name}.tif", cm, nodata=65535, names=(), scale=0.01)
        write_map(f"pack/rgb/{name}.tif", np.full((3, 9, 9), 90, np.uint8), nodata=None, names=())
    with (tmp_path / "pack" / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "kind", "site", "split", "rgb_path", "chm_path"])
        writer.writerows([*row, f"rgb/{row[0]}.tif", f"chm/{row[0]}.tif"] for row in rows)
    return tmp_path / "pack"


@pytest.fixture
def small(manifests, monkeypatch):
    """The pack benchmark with the groups that `pack` has; reports are others' tests and take their time."""
    monkeypatch.setattr(
        "canopy.evaluation.benchmark.run.write_results", lambda result, out: out.mkdir(parents=True)
    )
    groups = yaml.safe_load((manifests_dir() / "benchmarks" / "pack.yaml").read_text())["groups"]
    del groups["test-hard"]
    leakage = [
        {"models": ["canopy-*"], "seen": "near", "why": "same sites", "groups": ["val"], "source": "card"},
        {"models": ["canopy-*"], "seen": "no", "why": "another place", "source": "card"},
    ]
    manifests("pack", groups=groups, leakage=leakage)
    return benchmark("pack")


def too_high_by(metres):
    """A "model" that knows the truth and adds some metres."""

    def predict(scene, path):
        with rasterio.open(scene.reference) as dataset:
            heights = dataset.read(1) * np.float32(0.01) + np.float32(metres)
            profile = dataset.profile | {"dtype": "float32", "nodata": np.nan}
        with rasterio.open(path, "w", **profile) as made:
            made.write(heights[None].astype(np.float32))

    return predict


def test_all_manifests_are_strict_and_complete():
    assert manifest_names("benchmarks") == NAMES
    for name in NAMES:
        made = benchmark(name)
        for ours in ("default", "canopy-lite-v5"):
            assert all(made.leak_of((ours,), group) is not None for group in made.groups)
    assert benchmark("neon-test").leak_of(("v2",), "all").seen == "yes"
    assert benchmark("neon-test").leak_of(("somebody's",), "all") is None
    text = markdown(benchmark("neon-test"), [])
    for words in ("v1 huge, satellite", "3.15", "0.51", "arXiv 2304.07213", "**yes**, trained on NEON"):
        assert words in text, "published scores stand beside ours"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"metrics": ["mae"]}, "unknown metric 'mae'"),
        ({"imagery": "nowhere"}, "no imagery source 'nowhere'"),
        ({"published": [{"model": "x", "scores": {"mse": 1}, "measured_on": "y", "source": "z"}]}, "'mse'"),
        ({"leakage": [{"models": ["a"], "seen": "maybe", "why": "b", "source": "c"}]}, "leakage"),
    ],
)
def test_a_wrong_manifest_is_refused(manifests, fields, words):
    manifests("france", **fields)
    with pytest.raises((ConfigError, InputError), match=words):
        benchmark("france")


def test_scenes_of_the_real_pack(shared):
    counts = {}
    for scene in scenes_of(benchmark("pack"), shared / "data"):
        counts[scene.group] = counts.get(scene.group, 0) + 1
        assert scene.whole_image and scene.images[0].is_file() and scene.reference.is_file()
    assert counts == {"val": 27, "val-plots": 17, "test": 7, "test-hard": 4}


def test_folders_of_references_and_images(tmp_path, write_map, forest):
    for name in ("france", "neon-test", "california", "sao-paulo"):
        with pytest.raises(InputError, match=r"canopy data get .* -o DIR/"):
            scenes_of(benchmark(name), None)
        with pytest.raises(InputError, match=rf"no rasters in reference/.*canopy data get .*{tmp_path}/"):
            scenes_of(benchmark(name), tmp_path)
    write_map("reference/NEON_D17_SJER_DP3_257000_4112000_CHM.tif", forest(30))
    write_map("reference/more/NEON_D01_HARV_DP3_730000_4710000_CHM.tif", forest(30))
    named = scenes_of(benchmark("neon-test"), tmp_path)
    assert [(s.site, s.imagery, s.images) for s in named] == [("SJER", "naip", ())]  # HARV is excluded
    with pytest.raises(InputError, match="no rasters in imagery"):
        scenes_of(benchmark("sao-paulo"), tmp_path)
    write_map("imagery/a.tif", np.zeros((3, 9, 9), np.uint8), nodata=None, names=())
    own = scenes_of(benchmark("neon-test"), tmp_path)
    assert own[0].images == (tmp_path / "imagery",) and own[0].imagery is None


def test_broken_packs_are_named(small, pack, tmp_path):
    with pytest.raises(InputError, match="no manifest"):
        scenes_of(small, tmp_path)
    (pack / "chm" / "d.tif").unlink()
    with pytest.raises(InputError, match=r"d\.tif: a file of manifest.csv is not there"):
        scenes_of(small, pack)
    (pack / "manifest.csv").write_text("id,site\n")
    with pytest.raises(DataError, match="no column 'chm_path'"):
        scenes_of(small, pack)


def test_scores_are_pooled_and_the_table_grows_and_replaces(small, pack, tmp_path):
    scenes = scenes_of(small, pack)
    first = run_benchmark(small, scenes, OURS, too_high_by(1.5), tmp_path / "out", replicates=0)
    scored = [(name, found.provenance["scenes"]) for name, found in first.groups.items()]
    assert scored == [("val", 2), ("val-plots", 1), ("test", 1)]
    val = first.groups["val"].overall
    assert val.n == 20_000 and set(first.groups["val"].strata["site"]) == {"Wood", "Hill"}
    for name in ("mae_m", "bias_m"):
        assert val[name].value == pytest.approx(1.5, abs=1e-4)
    lines = audit_lines(first)
    assert "val: was default trained here? near: same sites" in lines[0]
    assert "test: was default trained here? no: another place" in lines[2]

    path = tmp_path / "results.csv"
    rows = append_rows(path, rows_of(first, "2026-11-22"))
    assert [(r["group"], r["site"]) for r in rows] == [
        ("val", "all"), ("val", "Wood"), ("val", "Hill"), ("val-plots", "all"), ("val-plots", "Plot"),
        ("test", "all"), ("test", "Far"),
    ]  # fmt: skip
    other = Judged("v2", "cd" * 32, ("v2",))
    second = run_benchmark(small, scenes, other, too_high_by(-2), tmp_path / "out", replicates=0)
    assert len(append_rows(path, rows_of(second))) == 14
    text = markdown(small, append_rows(path, rows_of(first)))
    lines = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 10 and len({line.count("|") for line in lines}) == 1, "one table of equal rows"
    line = next(line for line in lines if line.startswith("| val:") and "default" in line)
    assert "| near | 20,000 | 1.50 | 1.50 | 1.50 |" in line
    assert any("v2 `cdcdcdcd`" in line and "unknown" in line for line in text.splitlines())
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="another layout"):
        append_rows(path, rows_of(first))


def test_maps_are_kept_and_one_bad_scene_does_not_stop_the_others(small, pack, tmp_path):
    def predict(scene, path):
        if scene.id in bad:
            raise AreaError("no image here")
        too_high_by(0)(scene, path)

    scenes, bad = scenes_of(small, pack, ("val",)), {"b"}
    result = run_benchmark(small, scenes, OURS, predict, tmp_path / "out", replicates=0)
    assert result.failed == {"b": "no image here"} and result.groups["val"].provenance["scenes"] == 1
    bad = {"a", "b"}
    shutil.rmtree(tmp_path / "out" / "default-abababab")
    again = run_benchmark(small, scenes, OURS, predict, tmp_path / "out", replicates=0)
    assert again.groups["val"].overall["mae_m"] == result.groups["val"].overall["mae_m"], "the map is there"
    with pytest.raises(InputError, match=r"no scene of group 'val'.*no image here"):
        run_benchmark(small, scenes, OURS, predict, tmp_path / "other", replicates=0)


def test_decimetres_that_the_files_do_not_tell_are_read_as_the_manifest_says(tmp_path, forest, write_map):
    """Open-Canopy's height models: whole decimetres; a file that says its scale or unit is believed."""
    manifest = benchmark("open-canopy")
    assert manifest.unit_m == 0.1
    metres = forest(100)
    stored = (metres * 10).round().astype(np.uint16)
    bare = write_map("bare.tif", stored, nodata=65535, names=())
    told = write_map("told.tif", (metres * 100).round().astype(np.uint16), nodata=65535, names=(), scale=0.01)
    for path, step in ((bare, 0.1), (told, 0.01)):
        with open_heights(path, reference=True, unit_m=manifest.unit_m) as heights:
            read, valid = heights.read(heights.lattice)
        np.testing.assert_allclose(read[0][valid], metres[valid], atol=step)
