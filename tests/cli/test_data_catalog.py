"""`canopy data list | describe | get | verify` through the command line."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from canopy.download import RetryPolicy, crc32c, use_policy
from canopy.runtime import bundled_dir

BODY = random.Random(1).randbytes(3000)
NAME = "NEON_D01_HARV_DP3_732000_4713000_CHM.tif"
PLACE = f"HARV-2022-08/{NAME}"
HERE = ("--bbox", "42.5369,-72.1727", "--size-m", "300")


@pytest.fixture
def server():
    path = Path(__file__).parents[1] / "servers.py"
    spec = importlib.util.spec_from_file_location("canopy_tests_servers_cli", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    running = module.start()
    with use_policy(RetryPolicy(attempts=3, first_wait_s=0.02, longest_wait_s=1.0, timeout_s=5.0)):
        yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def neon(server, tmp_path, monkeypatch):
    """NEON's API with one tile of HARV."""
    folder = tmp_path / "manifests"
    shutil.copytree(bundled_dir("data_manifests"), folder)
    path = folder / "labels" / "neon.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "href": f"{server.url}/api"}))
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder))
    monkeypatch.setenv("NEON_API_TOKEN", "top-secret")
    url = server.put(f"/files/{NAME}", BODY)
    row = {"name": NAME, "size": len(BODY), "crc32c": f"{crc32c(BODY):08x}", "url": f"{url}?sig=top-secret"}
    sites = [{"siteCode": "HARV", "availableMonths": ["2022-08"]}]
    server.put("/api/products/DP3.30015.001", {"data": {"siteCodes": sites}})
    server.put("/api/data/DP3.30015.001/HARV/2022-08", {"data": {"files": [row]}})
    return server


def test_get_lists_fetches_keeps_and_verifies(canopy, neon, tmp_path):
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", "--dry-run")
    assert (
        ran.code == 0
        and f"3 kB  HARV-2022-08/{NAME}  2022-08" in ran.out
        and "1 files, 3 kB; CC0 1.0" in ran.out
    )
    assert not (tmp_path / "out").exists() and neon.asked("/files/") == 0
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", "-v")
    assert ran.code == 0 and "1 fetched, 0 kept" in ran.out and "top-secret" not in ran.out + ran.err
    assert (tmp_path / "out" / PLACE).read_bytes() == BODY
    told = json.loads(canopy("data", "get", "neon", *HERE, "-o", "out", "--json").out)
    assert told["kept"] == [PLACE] and told["fetched"] == [] and "top-secret" not in json.dumps(told)
    assert neon.asked("/files/") == 1
    assert "1 files are as they were fetched" in canopy("data", "verify", "out").out
    (tmp_path / "out" / PLACE).write_bytes(b"x")
    ran = canopy("data", "verify", "out")
    assert ran.code == 2 and f"such as {PLACE}: 1 bytes instead of 3000" in ran.error_line


def test_too_much_is_asked_about_and_bad_input_writes_nothing(canopy, neon, tmp_path):
    for words, message in (
        (("neon", *HERE, "--max-gb", "0.000001"), "--yes"),
        (("neom", *HERE), "did you mean 'neon'"),
        (("neon", *HERE, "--product", "chn"), "no product 'chn'"),
        (("neon", *HERE, "--datetime", "soon"), "--datetime"),
        (("neon", "--bbox", "142.5,-72.17", "--size-m", "300"), "latitude"),
        (("neon", "--site", "HARW"), "did you mean HARV"),
        (("france-lidar-hd", "--site", "HARV", *HERE), "sites are NEON's. Leave --site out"),
        (("sao-paulo", "--match", "3314"), "is found by area; expected --bbox"),
    ):
        ran = canopy("data", "get", *words, "-o", "out")
        assert ran.code == 2 and message in ran.error_line and "Traceback" not in ran.err
        assert not (tmp_path / "out").exists()
    assert canopy("data", "get", "neon", *HERE, "-o", "out", "--max-gb", "0.000001", "--yes", "-q").out == ""
    assert (tmp_path / "out" / PLACE).is_file()


def test_list_shows_imagery_labels_and_models(canopy):
    told = json.loads(canopy("data", "list", "--json").out)
    assert {"naip", "ign-ortho"} <= set(told["imagery"]) and {"neon", "gedi-l2a"} <= set(told["labels"])
    assert all(row["licence"] for group in told.values() for row in group.values())
    text = canopy("data", "list").out
    assert "labels:" in text and "france-lidar-hd" in text and "Licence Ouverte 2.0" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("neon", "citation: NEON (National"),
        ("naip", "licence: public domain"),
        ("tree", "flight_site: STEI"),
        ("BLAN", "flight_crs: EPSG:32617"),
        (NAME, "bounds: 732000, 4713000, 733000, 4714000"),
    ],
)
def test_describe_prints_facts_of_sources_sites_and_tiles(canopy, name, expected):
    ran = canopy("data", "describe", name)
    assert ran.code == 0 and expected in ran.out
    assert json.loads(canopy("data", "describe", name, "--json").out)


def test_verify_checks_manifests(canopy, neon, tmp_path):
    assert "neon" in json.loads(canopy("data", "verify", "all", "--json").out)["manifests"]
    path = tmp_path / "manifests" / "labels" / "neon.yaml"
    path.write_text(path.read_text() + "licenze: x\n")
    ran = canopy("data", "verify", "neon")
    assert ran.code == 2 and "licenze" in ran.error_line
    assert canopy("data", "verify", "nothing").code == 2
    assert canopy("data", "describe", "nothing").code == 2
