"""Fixtures of the behaviour suite; inputs and expensive outputs are made once a session."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import behaviour_support as support


@pytest.fixture
def canopy(tmp_path: Path) -> Callable[..., support.Ran]:
    """`canopy("predict", "a.tif", ..., code=0)` in `tmp_path`."""
    return partial(support.run, tmp_path)


@pytest.fixture(scope="session")
def model() -> Path:
    """A small trained network: crops of 64 px at 0.5 m."""
    return support.GOLDENS / "small.safetensors"


@pytest.fixture(scope="session")
def banded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with calibrated intervals and a domain in its card."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(model, "numpy") as file:
        facts = dict(file.metadata())
    card = json.loads(facts["card"]) | json.loads((support.GOLDENS / "bands.json").read_text())
    path = tmp_path_factory.mktemp("banded") / "banded.safetensors"
    save_file(load_file(model), path, facts | {"card": json.dumps(card)})
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of input files that no test writes to.

    wood.tif: 240 x 300 px of 0.5 m in UTM 18N with a hole without imagery, of 2021-06-15; wood_chm.tif: its
    true heights at 1 m. whole.tif: the same without the hole. zone17.tif, degrees.tif: that in other systems
    and pixels. mixed/: two images of neighbouring ground in two systems.
    """
    folder = tmp_path_factory.mktemp("inputs")
    rgb, chm = support.forest(240, 300, seed=1)
    day = {"TIFFTAG_DATETIME": "2021:06:15 10:00:00"}
    support.write_raster(
        folder / "wood_chm.tif", chm.reshape(120, 2, 150, 2).mean(axis=(1, 3)), gsd=1.0, nodata=float("nan")
    )
    whole = support.write_image(folder / "whole.tif", rgb, nodata=0, tags=day)
    support.warped(whole, folder / "zone17.tif", "EPSG:32617", 0.3)
    support.warped(whole, folder / "degrees.tif", "EPSG:4326", 0.5 / 111_320)
    rgb[:, 100:130, 200:240] = 0
    support.write_image(folder / "wood.tif", rgb, nodata=0, tags=day)
    left, right = rgb[:, :, :180], rgb[:, :, 140:]
    support.write_image(folder / "mixed" / "a.tif", left, nodata=0, tags=day)
    east = support.write_image(folder / "b.tif", right, west=support.WEST + 70, nodata=0)
    support.warped(east, folder / "mixed" / "b.tif", "EPSG:3857", 0.5 / np.cos(np.radians(44.09)))
    return folder


@pytest.fixture(scope="session")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `canopy data chips`: eight held-out woods of 96 m, and four for training."""
    folder = tmp_path_factory.mktemp("chips")
    rows = ["id,site,kind,rgb_path,chm_path,split"]
    for number in range(12):
        rgb, chm = support.forest(192, 192, seed=40 + number)
        north = support.NORTH + 1000 * number
        support.write_image(folder / f"{number}_rgb.tif", rgb, north=north)
        labels = chm.reshape(96, 2, 96, 2).mean(axis=(1, 3))
        support.write_raster(folder / f"{number}_chm.tif", labels, gsd=1.0, north=north, nodata=float("nan"))
        split = "val" if number < 8 else "train"
        rows.append(f"w{number},s{number % 4},lidar,{number}_rgb.tif,{number}_chm.tif,{split}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    words = ("--manifest", "manifest.csv", "-o", "chips", "--size-px", 192, "--json")
    (folder / "told.json").write_text(support.run(folder, "data", "chips", *words).out)
    return folder / "chips"
