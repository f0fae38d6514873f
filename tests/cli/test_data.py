"""`canopy data synth` through the command line."""

from __future__ import annotations

import builtins
import json

import pytest

FILES = {"rgb.tif", "chm.tif", "points.laz", "gedi.h5", "scene.json"}


def test_it_writes_a_scene_and_says_what_it_holds(canopy, tmp_path):
    ran = canopy("data", "synth", "-o", "scene", "--seed", "3", "--size-m", "60")
    assert ran.code == 0 and {p.name for p in (tmp_path / "scene").iterdir()} == FILES
    assert "120 x 120 px" in ran.out and "trees" in ran.out and "GEDI" in ran.out


def test_json_is_one_object_and_nothing_else(canopy):
    ran = canopy("data", "synth", "-o", "s", "--size-m", "40", "--gsd", "1", "--gedi-jitter-m", "5", "--json")
    told = json.loads(ran.out)
    assert ran.code == 0 and told["planted"]["gedi"]["jitter_m"] == 5 and told["width_px"] == 40
    assert set(told["files"]) == FILES - {"scene.json"} and ran.err == ""


def test_existing_outputs_are_kept_without_overwrite(canopy, tmp_path):
    words = ("data", "synth", "-o", "s", "--size-m", "20", "-q")
    assert canopy(*words).out == ""
    before = (tmp_path / "s" / "chm.tif").read_bytes()
    ran = canopy(*words, "--seed", "4")
    assert ran.code == 2 and "--overwrite" in ran.error_line
    assert (tmp_path / "s" / "chm.tif").read_bytes() == before
    assert canopy(*words, "--seed", "4", "--overwrite").code == 0
    assert (tmp_path / "s" / "chm.tif").read_bytes() != before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--size-m", "0"), "--size-m"),
        (("--size-m", "-5"), "--size-m"),
        (("--size-m", "nan"), "--size-m"),
        (("--size-m", "1e7"), "--size-m"),
        (("--size-m", "0.1"), "--size-m"),
        (("--gsd", "0.05"), "--gsd"),
        (("--gsd", "6"), "--gsd"),
        (("--gsd", "nan"), "--gsd"),
        (("--seed", "-1"), "--seed"),
        (("--gedi-jitter-m", "-1"), "--gedi-jitter-m"),
    ],
)
def test_bad_numbers_exit_2_in_one_line_and_write_nothing(canopy, tmp_path, words, named):
    ran = canopy("data", "synth", "-o", "s", *words)
    assert ran.code == 2 and named in ran.error_line and "expected" in ran.error_line
    assert "Traceback" not in ran.err and not (tmp_path / "s").exists()


def test_no_folder_named_exits_2(canopy):
    assert canopy("data", "synth").code == 2


def test_a_missing_library_is_named_with_its_remedy(canopy, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("no h5py", name="h5py")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = canopy("data", "synth", "-o", "s", "--size-m", "20")
    assert ran.code == 2 and "pip install 'canopy-height[gedi]'" in ran.error_line
    assert not (tmp_path / "s").exists()


def test_help_has_an_example(canopy):
    ran = canopy("data", "synth", "--help")
    assert ran.code == 0 and "Example: canopy data synth" in ran.out and "--gedi-jitter-m" in ran.out
