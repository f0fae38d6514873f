"""`canopy data chips` through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio

FILES = {"shards", "index.csv", "index.parquet", "settings.json", "summary.json", "contact_sheet.png"}
WORDS = ("data", "chips", "--manifest", "manifest.csv", "-o", "out", "--no-register")


@pytest.fixture
def manifest(make_image, tmp_path):
    rng = np.random.default_rng(0)
    # Detail down to the pixel: the smooth picture other tests use is rejected as blurred, and rightly.
    make_image("rgb.tif", rng.integers(60, 180, (3, 100, 120)).astype(np.uint8))
    heights = rng.uniform(3, 20, (1, 50, 60)).astype(np.float32)
    # Blocks of 8 m without structure: random heights are not judged against the picture.
    make_image("chm.tif", heights, transform=rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000))
    path = tmp_path / "manifest.csv"
    path.write_text("id,rgb_path,chm_path,split\na,rgb.tif,chm.tif,train\n")
    return path


def test_it_cuts_says_what_it_cut_and_does_not_cut_twice(canopy, manifest, tmp_path):
    ran = canopy(*WORDS)
    assert "no val chips" in ran.err  # one image is one block, and cannot be split
    assert ran.code == 0 and "1 chips, 0 rejected" in ran.out and "1 of 1 shards cut now" in ran.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    assert "0 of 1 shards cut now" in canopy(*WORDS).out
    told = json.loads(canopy(*WORDS, "--json").out)
    assert told["chips"] == 1 and told["cut_now"] == 0 and told["train_chips_within_buffer_of_test"] == 0
    assert canopy(*WORDS, "-q").out == ""


def test_the_file_is_the_id_of_a_pair_without_one(canopy, manifest, tmp_path):
    manifest.write_text("rgb_path,chm_path\nrgb.tif,chm.tif\n")
    assert canopy(*WORDS).code == 0
    assert ",rgb," in (tmp_path / "out" / "index.csv").read_text()
    manifest.write_text("image,chm_path\nrgb.tif,chm.tif\n")
    assert "rgb_path" in canopy(*WORDS, "--overwrite").error_line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--size-px", "33"), "size_px"),
        (("--gsd", "0"), "0.05"),
        (("--label-rule", "median"), "'mean' or 'max'"),
        (("--max-shift-m", "99"), "shift"),
        (("--buffer-m", "-1"), "buffer"),
        (("--val", "0.6", "--test", "0.6"), "train"),
        (("--hold-out", "WLOU"), "WLOU"),
        (("--workers", "0"), "workers"),
        (("--manifest", "none.csv"), "none.csv"),
    ],
)
def test_bad_input_exits_2_in_one_line_and_writes_nothing(canopy, manifest, tmp_path, words, named):
    ran = canopy(*WORDS, *words)
    assert ran.code == 2 and named in ran.error_line and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_synthetic_chips_refuse_what_is_for_pairs(canopy, tmp_path):
    words = ("data", "chips", "--synth", "1", "-o", "out")
    ran = canopy(*words, "--gsd", "1", "--no-register", "--val", "0.1", "--workers", "2")
    assert ran.code == 2 and "Leave --gsd, --no-register, --val, --workers out" in ran.error_line
    assert not (tmp_path / "out").exists()
    assert canopy(*words, "--size-px", "64", "--seed", "1").code == 0
