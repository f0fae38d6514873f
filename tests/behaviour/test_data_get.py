"""`canopy data list | describe | get | verify`, from a server of this machine."""

from __future__ import annotations

import hashlib
import random

import behaviour_support as support
import pytest

NAME = "NEON_D01_HARV_DP3_732000_4713000_CHM.tif"
PLACE = f"HARV-2022-08/{NAME}"
HERE = ("--bbox", "42.5369,-72.1727", "--size-m", "300")
BODY = random.Random(1).randbytes(300_000)


@pytest.fixture
def neon(server, point_at, monkeypatch):
    """NEON's API with one tile of HARV, and manifests that point to it."""
    point_at("neon", f"{server.url}/api")
    monkeypatch.setenv("NEON_API_TOKEN", "top-secret")
    row = {"name": NAME, "size": len(BODY), "md5": hashlib.md5(BODY).hexdigest()}
    row["url"] = f"{server.put(f'/files/{NAME}', BODY)}?sig=top-secret"
    sites = [{"siteCode": "HARV", "availableMonths": ["2022-08"]}]
    server.put("/api/products/DP3.30015.001", {"data": {"siteCodes": sites}})
    server.put("/api/data/DP3.30015.001/HARV/2022-08", {"data": {"files": [row]}})
    return server


def test_files_are_listed_fetched_kept_and_verified(canopy, neon, tmp_path) -> None:
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", "--dry-run")
    assert f"HARV-2022-08/{NAME}" in ran.out and "1 files" in ran.out and "CC0 1.0" in ran.out
    assert not (tmp_path / "out").exists() and not neon.asked("/files/")
    neon.cut("/files/", after=150_000)  # the connection breaks once
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", "-v")
    assert "1 fetched" in ran.out and "top-secret" not in ran.out + ran.err
    assert (tmp_path / "out" / PLACE).read_bytes() == BODY
    asked = [first for _, path, first in neon.log if path.startswith("/files/")]
    assert len(asked) >= 2 and asked[-1] > 0, "a broken download is gone on with"
    told = canopy("data", "get", "neon", *HERE, "-o", "out", "--json").json
    support.check_keys("get", told)
    assert told["kept"] == [PLACE] and told["fetched"] == []
    assert "1 files are as they were fetched" in canopy("data", "verify", "out").out
    (tmp_path / "out" / PLACE).write_bytes(b"x")
    assert PLACE in canopy("data", "verify", "out", code=2).error_line


def test_a_file_that_is_not_what_was_promised_is_refused(canopy, neon, tmp_path) -> None:
    neon.put(f"/files/{NAME}", BODY[:-1] + b"?")
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", code=2)
    assert NAME in ran.error_line and not (tmp_path / "out" / PLACE).exists()


def test_bad_wishes_write_nothing(canopy, neon, tmp_path) -> None:
    for words, says in (
        (("neon", *HERE, "--max-gb", "0.0000001"), "--yes"),
        (("neom", *HERE), "did you mean 'neon'"),
        (("neon", *HERE, "--product", "chn"), "no product 'chn'"),
        (("neon", "--bbox", "142.5,-72.17", "--size-m", "300"), "latitude"),
        (("neon", "--site", "HARW"), "did you mean HARV"),
    ):
        assert says in canopy("data", "get", *words, "-o", "out", code=2).error_line
        assert not (tmp_path / "out").exists()


def test_lists_and_descriptions(canopy, neon) -> None:
    told = canopy("data", "list", "--json").json
    assert {"naip", "ign-ortho", "demo"} <= set(told["imagery"])
    support.check_keys("data_list", {kind: dict.fromkeys(rows) for kind, rows in told.items()})
    assert all(row["licence"] for rows in told.values() for row in rows.values())
    for name in ("neon", "naip", "HARV", "france-lidar-hd"):
        support.check_keys(f"describe_{name}", canopy("data", "describe", name, "--json").json)
    assert "neon" in canopy("data", "verify", "all", "--json").json["manifests"]
    canopy("data", "describe", "nothing", code=2)
