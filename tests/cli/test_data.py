"""`canopy data list | describe | get | verify | synth` through the command line."""

from __future__ import annotations

import builtins
import json
import random

import pytest

BODY = random.Random(1).randbytes(3000)
NAME = "NEON_D01_HARV_DP3_732000_4713000_CHM.tif"
PLACE = f"HARV-2022-08/{NAME}"
HERE = ("--bbox", "42.5369,-72.1727", "--size-m", "300")


@pytest.fixture
def neon(server, point_at, monkeypatch):
    """NEON's API with one tile of HARV."""
    point_at("neon", f"{server.url}/api")
    monkeypatch.setenv("NEON_API_TOKEN", "top-secret")
    url = server.put(f"/files/{NAME}", BODY)
    row = {"name": NAME, "size": len(BODY), "url": f"{url}?sig=top-secret"}
    sites = [{"siteCode": "HARV", "availableMonths": ["2022-08"]}]
    server.put("/api/products/DP3.30015.001", {"data": {"siteCodes": sites}})
    server.put("/api/data/DP3.30015.001/HARV/2022-08", {"data": {"files": [row]}})
    return server


def test_get_lists_asks_about_much_and_says_how_to_cite(canopy, neon, tmp_path):
    words = ("data", "get", "neon", *HERE, "-o", "out")
    ran = canopy(*words, "--dry-run")
    assert ran.code == 0 and f"3.0 kB  {PLACE}  2022-08" in ran.out and "1 files, 3.0 kB; CC0 1.0" in ran.out
    ran = canopy(*words, "--max-gb", "0.000001")
    assert ran.code == 2 and "--yes" in ran.error_line and not (tmp_path / "out").exists()
    ran = canopy(*words, "--max-gb", "0.000001", "--yes")
    assert ran.code == 0 and "1 fetched, 0 kept; cite: NEON (National" in ran.out
    assert (tmp_path / "out" / PLACE).read_bytes() == BODY


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("neon", *HERE, "--datetime", "soon"), "--datetime"),
        (("france-lidar-hd", "--site", "HARV", *HERE), "sites are NEON's. Leave --site out"),
        (("sao-paulo", "--match", "3314"), "is found by area; expected --bbox"),
    ],
)
def test_bad_wishes_exit_2_and_write_nothing(canopy, tmp_path, words, message):
    ran = canopy("data", "get", *words, "-o", "out")
    assert ran.code == 2 and message in ran.error_line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("neon", "citation: NEON (National"),
        ("naip", "licence: public domain"),
        ("tree", "flight_site: STEI"),
        ("BLAN", "flight_crs: EPSG:32617"),
        (NAME, "- 732000\n- 4713000\n- 733000\n- 4714000\n"),
    ],
)
def test_describe_prints_facts_of_sources_sites_and_tiles(canopy, name, expected):
    ran = canopy("data", "describe", name)
    assert ran.code == 0 and expected in ran.out
    assert json.loads(canopy("data", "describe", name, "--json").out)


def test_verify_checks_manifests(canopy, point_at, tmp_path):
    point_at("neon", "https://data.neonscience.org/api/v0", licenze="x")
    assert "licenze" in canopy("data", "verify", "neon").error_line
    assert canopy("data", "verify", "gedi-l2a").out == "valid: gedi-l2a\n"
    for words in (("verify", "nothing"), ("describe", "nothing")):
        ran = canopy("data", *words)
        assert ran.code == 2 and "naip" in ran.error_line


# ---- synth ------------------------------------------------------------------------------------
def test_a_scene_is_kept_without_overwrite(canopy, tmp_path):
    words = ("data", "synth", "-o", "s", "--size-m", "40", "--gsd", "1")
    ran = canopy(*words, "--gedi-jitter-m", "5", "--json")
    told = json.loads(ran.out)
    assert ran.code == 0 and told["planted"]["gedi"]["jitter_m"] == 5 and ran.err == ""
    before = (tmp_path / "s" / "chm.tif").read_bytes()
    ran = canopy(*words, "--seed", "4")
    assert ran.code == 2 and "--overwrite" in ran.error_line
    assert (tmp_path / "s" / "chm.tif").read_bytes() == before
    ran = canopy(*words, "--seed", "4", "--overwrite")
    assert ran.code == 0 and "40 x 40 px" in ran.out and "trees" in ran.out and "GEDI" in ran.out
    assert (tmp_path / "s" / "chm.tif").read_bytes() != before


@pytest.mark.parametrize(
    "words",
    [("--size-m", "0"), ("--size-m", "nan"), ("--size-m", "1e7"), ("--size-m", "0.1"), ("--gsd", "0.05"),
     ("--gsd", "6"), ("--seed", "-1"), ("--gedi-jitter-m", "-1")],
)  # fmt: skip
def test_bad_numbers_exit_2_in_one_line_and_write_nothing(canopy, tmp_path, words):
    ran = canopy("data", "synth", "-o", "s", *words)
    assert ran.code == 2 and words[0] in ran.error_line and "expected" in ran.error_line
    assert "Traceback" not in ran.err and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "words", [("synth", "-o", "s", "--size-m", "20"), ("gedi", "a.h5", "-o", "s.parquet")]
)
def test_a_missing_library_is_named_with_its_remedy(canopy, monkeypatch, tmp_path, words):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("no h5py", name="h5py")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = canopy("data", *words)
    assert ran.code == 2 and "pip install 'canopy-height[gedi]'" in ran.error_line
    assert not list(tmp_path.iterdir())
