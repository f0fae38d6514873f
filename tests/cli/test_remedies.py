"""What a message says to type is typed, until the command runs: no remedy leads to a refusal without one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.shutil
from shapely.geometry import Point, box

METRE = rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000)
TRUE_CRS = "EPSG:32618"
# What a user knows who is asked to name it; the rest stands in the message itself.
ANSWERS = {"--band": "zmax", "--layer": "stands", "--input-crs": TRUE_CRS, "--column": "tree"}


@pytest.fixture
def walk(canopy, tmp_path):
    """`walk("stats", ...)`: the options and commands that were typed until it ran."""

    def type_rio(command: str, where: str, words: list[str]) -> None:
        typed = command.replace("EPSG:32610", TRUE_CRS).replace("FILE", where).split()
        subprocess.run([str(Path(sys.executable).parent / typed[0]), *typed[1:]], check=True, cwd=tmp_path)
        if typed[1] == "convert":
            words[words.index(where)] = typed[-1]

    def type_option(remedy: str, words: list[str]) -> str:
        name, value = re.findall(r"(--[a-z-]+)(?: ([\w:,./]+))?", remedy)[-1]
        value = ANSWERS.get(name, value)
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value] if value and name != "--overwrite" else [name]
        return name

    def run(*given: object) -> list[str]:
        words, steps = [str(word) for word in given], list[str]()
        while (ran := canopy(*words)).code:
            assert ran.code == 2 and len(steps) < 6, (steps, ran.err)
            line = ran.error_line
            command = re.search(r"rio [a-z-]+ .*?FILE( FILE\.tif)?", line)
            if command:
                type_rio(command[0], re.search(r"^canopy: (\S+?): ", line)[1].split("/")[-1], words)
                steps.append(command[0].split()[1])
            else:
                steps.append(type_option(line.rpartition(". ")[2], words))
            assert len(set(steps)) == len(steps) or command, f"sent back: {steps}, {line}"
        return steps

    return run


def test_images(walk, make_image, model_file, rgb, tmp_path) -> None:
    predict = ["predict", "--model", model_file, "-o", "chm.tif"]
    make_image("odd.tif", rgb.astype("uint16") * 257, crs=None)
    assert sorted(walk(*predict, "odd.tif")) == ["--input-crs", "--scale"]
    local = 'LOCAL_CS["UTM zone 18N",UNIT["metre",1]]'
    four = np.concatenate([rgb[:1], rgb])
    make_image("nir.tif", four, crs=local, photometric="RGB", descriptions=("NIR", "Red", "Green", "Blue"))
    assert sorted(walk(*predict, "nir.tif")) == ["--bands", "--input-crs", "--overwrite"]
    make_image("many/a.tif")
    (tmp_path / "many" / "b.tif").symlink_to("nowhere.tif")
    assert walk(*predict, "many", "--overwrite") == ["--on-damaged"]


def test_heights_and_zones(walk, make_image, tmp_path) -> None:
    heights = np.random.default_rng(0).uniform(1, 30, (2, 50, 60)).astype("float32")
    with rasterio.open(
        make_image("z.tif", heights, crs=None, transform=METRE, descriptions=("zmean", "zmax")), "r+"
    ) as file:
        file.units = ["furlong", "furlong"]
    zone = geopandas.GeoDataFrame({"n": [1]}, geometry=[box(5e5, 4_881_960, 500_040, 4.882e6)], crs=TRUE_CRS)
    for layer in ("stands", "roads"):
        zone.to_file(tmp_path / "zones.gpkg", layer=layer)
    steps = walk("stats", "z.tif", "--zones", "zones.gpkg", "-o", "t.csv")
    assert sorted(steps) == ["--band", "--layer", "edit-info", "edit-info"]
    zone.to_file(tmp_path / "one.gpkg")
    cm = make_image("cm.tif", (heights[:1] * 100).astype("uint16"), transform=METRE)
    assert walk("stats", "cm.tif", "--zones", "one.gpkg", "-o", "u.csv") == ["edit-info"]
    with rasterio.open(cm) as file:
        assert file.units == ("cm",)
    plain = make_image("plain.tif", heights[:1], transform=METRE)
    rasterio.shutil.copy(plain, tmp_path / "a.asc", driver="AAIGrid")
    assert "convert" in walk("stats", "a.asc", "--zones", "one.gpkg", "-o", "v.csv")


def test_references_and_surfaces(walk, make_image, tmp_path) -> None:
    heights = np.random.default_rng(0).uniform(1, 30, (1, 50, 60)).astype("float32")
    make_image("a.tif", heights, transform=METRE)
    make_image("b.tif", heights + 1, transform=METRE)
    evaluate = ["evaluate", "a.tif", "--replicates", "0", "--reference"]
    assert walk(*evaluate, "b.tif", "--kind", "plots") == ["--kind"]
    plots = geopandas.GeoDataFrame({"tree": [12.0]}, geometry=[Point(500_030, 4_881_975)], crs=TRUE_CRS)
    plots.to_file(tmp_path / "plots.gpkg")
    assert walk(*evaluate, "plots.gpkg") == ["--column"]
    for name, values in (("dsm", heights + 200), ("dtm", np.full_like(heights, 200))):
        make_image(f"{name}.tif", values, crs=None, transform=METRE)
    surface = ["data", "chm", "--dsm", "dsm.tif", "--dtm", "dtm.tif", "-o", "chm.tif"]
    assert walk(*surface) == ["--input-crs"]
