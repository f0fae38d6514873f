"""`canopy predict` as its users meet it: what lies beside a map, what is said, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio


def test_the_stac_item(predict, make_image) -> None:
    """A NAIP image tells its day by its name."""
    predict(make_image("m_4407101_ne_18_060_20210715.tif"), "--quicklook")
    raw = json.loads(Path("chm.json").read_text())
    item = pystac.Item.from_dict(raw)
    assert item.id == "chm" and raw["stac_version"] == "1.1.0"
    assert item.datetime.date().isoformat() == "2021-07-15"
    assert item.properties["processing:software"]["canopy"] and item.common_metadata.created is not None
    asset = item.assets["canopy_height"]
    assert asset.extra_fields["file:size"] == Path("chm.tif").stat().st_size
    band = asset.extra_fields["raster:bands"][0]
    assert (band["unit"], band["data_type"], band["nodata"]) == ("m", "float32", "nan")
    assert [link.rel for link in item.links] == ["derived_from"]
    assert set(item.stac_extensions) == {
        f"https://stac-extensions.github.io/{name}/schema.json"
        for name in ("projection/v2.0.0", "raster/v1.1.0", "file/v2.1.0", "processing/v1.1.0")
    }
    assert all(Path(one.href).is_file() for one in item.assets.values())
    # An image of no known date.
    predict(make_image())
    item = pystac.Item.from_dict(json.loads(Path("chm.json").read_text()))
    assert item.datetime is None
    assert item.properties["start_datetime"] < item.properties["end_datetime"] <= item.properties["created"]


def test_a_map_without_its_item_is_no_map(predict, refused, make_image, model_file) -> None:
    """What lies beside a map takes its place with it, or nothing does."""
    image = make_image()
    predict(image, "--quicklook")
    Path("chm.json").unlink()
    Path("chm.json").mkdir()
    words = ("--quicklook", "--overwrite", "--gsd", "1", "-o", "chm.tif")
    assert "chm.json" in refused("predict", image, "--model", model_file, *words)


def test_what_is_said_and_the_default_name(canopy, make_image, model_file) -> None:
    image = make_image("forest.tif")
    assert canopy("predict", image, "--model", model_file, "-q").err == ""
    assert Path("forest_chm.tif").is_file()
    # A point alone is the middle of a square kilometre.
    planned = canopy(
        "predict", image, "--model", model_file, "--bbox", "44.09,-75", "--dry-run", "-o", "x.tif"
    )
    assert "1.0 x 1.0 km" in planned.err


@pytest.mark.parametrize(
    "words",
    [
        ("--gsd", "nan"), ("--precision", "int8", "--backend", "torch"), ("--precision", "int8"),
        ("--backend", "openvino", "--device", "cuda"), ("--batch-size", "0"), ("--workers", "0"),
        ("--bands", "1,2"), ("--date-band", "--encoding", "uint8m"), ("--interval", "0.9"),
        ("--model", "nothing"), ("--imagery", "demo"), ("-o", "x" * 250 + ".tif"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(refused, make_image, model_file, words: tuple[str, ...]) -> None:
    given = () if "--model" in words else ("--model", model_file)
    line = refused("predict", make_image(), "-o", "chm.tif", *given, *words)
    assert line.startswith("canopy: ") and len(line) < 700


def test_a_coarse_pixel_with_a_height_has_a_day(predict, make_image) -> None:
    """Also where the fine pixel at its middle has no image."""
    mask = np.ones((100, 120), bool)
    mask[1::3, 1::3] = False  # the middle of every 3 x 3
    placed = rasterio.Affine(0.5, 0, 500_001, 0, -0.5, 4_882_000.5)  # whole multiples of 1.5 m
    predict(make_image("a_20210715.tif", transform=placed, mask=mask), "--gsd", "1.5", "--date-band")
    with rasterio.open("chm.tif") as made:
        height, day = made.read()
    known = np.isfinite(height)
    assert known.any()
    assert (day[known] == (np.datetime64("2021-07-15") - np.datetime64("1970-01-01")).astype(int)).all()


def test_without_imagery_the_best_source_is_chosen_and_said(
    predict, refused, tmp_path, monkeypatch, make_image, model_file
) -> None:
    """Two sources of a private manifest folder cover the place: the better-ranked one is used."""
    manifests = tmp_path / "manifests" / "imagery"
    manifests.mkdir(parents=True)
    make_image("images/a.tif")
    for name, rank in (("second-best", 2), ("very-best", 1)):
        (manifests / f"{name}.yaml").write_text(
            f"name: {name}\ntitle: A test source\nkind: dir\nhref: {tmp_path / 'images'}\ngsd_m: 0.5\n"
            "licence: CC0-1.0\nattribution: nobody\n"
            f'dates: "2020/2021"\ncoverage: [-76, 44, -74, 45]\nrank: {rank}\n'
        )
    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "manifests"))
    assert "very-best" in predict("--bbox", "44.0909,-74.9996", "--size-m", "20").err
    with rasterio.open("chm.tif") as made:
        assert "very-best" in made.tags()["CANOPY_IMAGERY"]
    nowhere = ("--bbox", "10,10", "--size-m", "20", "--model", model_file, "-o", "x.tif")
    assert "no named source" in refused("predict", *nowhere)


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_ctrl_c_is_one_line_and_leaves_nothing(repo, model_file, tmp_path) -> None:
    words = ["predict", "--imagery", "demo", "--bbox", "44.083,-71.296", "--size-m", "1500", "-o", "chm.tif"]
    program = [
        sys.executable,
        "-c",
        "from canopy.cli.main import main; main()",
        *words,
        "--model",
        model_file,
    ]
    running = subprocess.Popen(
        program, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(repo)},
        # A shell's background jobs ignore the signal, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".chm.tif.*")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 130 and told[-1].startswith("canopy: interrupted; ")
    assert "Traceback" not in "".join(told) and list(tmp_path.iterdir()) == []


def test_an_image_without_a_valid_pixel_is_told_of(predict, make_image, rgb) -> None:
    make_image("a.tif", np.concatenate([rgb, np.zeros_like(rgb[:1])]), photometric="RGB", alpha="yes")
    assert "note: no pixel has a height" in predict("a.tif").err
