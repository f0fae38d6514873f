"""Facts beside a map: the STAC item of odd places, the quicklook's details, file names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st

import canopy
from canopy.errors import InputError
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.grid import Grid
from canopy.inference import output
from canopy.inference.layers import HEIGHT_BAND
from canopy.inference.options import OneMapOptions
from canopy.inference.output import Scenes, map_item
from canopy.inference.picture import round_length, write_quicklook
from canopy.inference.predict import prepare
from canopy.terms import Terms


def item_of(tmp_path: Path, grid: Grid, dates: tuple[str, ...] = (), **more: object) -> dict:
    path = tmp_path / "chm.tif"
    path.write_bytes(b"pixels")
    return map_item(
        path, grid, sha256="ab" * 32, encoding="float32", bands=(HEIGHT_BAND,),
        scenes=Scenes("a.tif", (), dates), model={"name": "m"}, statistics={"mean": math.nan}, **more,
    )  # fmt: skip


def test_an_item_across_the_antimeridian_is_split(tmp_path: Path) -> None:
    # The border of UTM zones 60 and 1, on the equator's side where 180 degrees is at 833,979 m of zone 60.
    grid = Grid.of("EPSG:32660", (100, 0, 832_000, 0, -100, 10_000), (50, 40))
    item = item_of(tmp_path, grid)
    assert item["geometry"]["type"] == "MultiPolygon"
    west, south, east, north = item["bbox"]
    assert west > 179 and east < -179 and 0 < south < north < 1


def test_an_item_without_an_epsg_code_has_its_wkt(tmp_path: Path) -> None:
    grid = Grid.of("+proj=laea +lat_0=12 +lon_0=33 +datum=WGS84", (10, 0, 0, 0, -10, 0), (5, 6))
    properties = item_of(tmp_path, grid)["properties"]
    assert properties["proj:code"] is None
    assert "Lambert Azimuthal" in properties["proj:wkt2"]


def test_dates_of_an_item(tmp_path: Path) -> None:
    grid = Grid.of("EPSG:32618", (1, 0, 500_000, 0, -1, 4_000_000), (5, 6))
    one = item_of(tmp_path, grid, dates=("2020-05-01",))["properties"]
    assert one["datetime"] == "2020-05-01T00:00:00Z"
    two = item_of(tmp_path, grid, dates=("2021-05-01", "2019-01-02"))["properties"]
    assert two["datetime"] is None
    assert (two["start_datetime"], two["end_datetime"]) == ("2019-01-02T00:00:00Z", "2021-05-01T23:59:59Z")


def test_the_terms_of_imagery_and_model_go_with_a_map(tmp_path: Path, small_model: Path) -> None:
    """Tags, STAC item, summary and the report say whose imagery it is, and what may be done with it."""
    out = tmp_path / "chm.tif"
    job = prepare(
        OneMapOptions(
            imagery="demo", bbox="44.083,-71.296", size_m=60, model=str(small_model), out=str(out),
            quicklook=True,
        )
    )  # fmt: skip
    assert job.describe()[-1] == "commercial use: yes (imagery: Apache-2.0; model: Apache-2.0)"
    told = job.run().to_dict()
    assert (
        told["commercial_use"] == "yes" and told["imagery_terms"]["attribution"] == "canopy synthetic scene"
    )
    with rasterio.open(out) as made:
        tags = made.tags()
    assert tags["CANOPY_IMAGERY_LICENCE"] == tags["CANOPY_MODEL_LICENCE"] == "Apache-2.0"
    assert (tags["CANOPY_IMAGERY_ATTRIBUTION"], tags["CANOPY_COMMERCIAL_USE"]) == (
        "canopy synthetic scene", "yes",
    )  # fmt: skip
    item = json.loads(out.with_suffix(".json").read_text())
    pystac.Item.from_dict(item)
    assert (
        item["properties"]["license"] == "Apache-2.0" and item["properties"]["canopy:commercial_use"] == "yes"
    )
    assert item["properties"]["providers"][0]["name"] == "canopy synthetic scene"
    score = tmp_path / "report"
    canopy.evaluate(out, reference=out, out=score)
    assert "The map's imagery: canopy synthetic scene, Apache-2.0." in (score / "report.html").read_text()


def test_the_weaker_of_imagery_and_model_decides() -> None:
    nc = Terms(licence="CC BY-NC 4.0", attribution="V", commercial_use="no")
    free = nc.model_copy(update={"licence": "CC0 1.0", "commercial_use": "yes"})
    for terms, licence, use in (
        (free, "Apache-2.0", "yes"), (free, "DINOv3 License", "ask"), (nc, "DINOv3 License", "no"),
        (None, "Apache-2.0", "ask"), (free, "", "ask"),
    ):  # fmt: skip
        found, text = output.commercial_use(terms, licence)
        assert found == use and text.startswith(f"commercial use: {use} (")


@given(st.floats(1e-3, 1e7))
def test_scale_bars_are_round_and_not_too_long(metres: float) -> None:
    length = round_length(metres)
    assert length <= metres * (1 + 1e-6) < length * 2.5 * (1 + 1e-6)
    assert f"{length:e}"[0] in "125"


@pytest.mark.parametrize("shape", [(1, 1), (2000, 30), (40, 3000)])
def test_quicklooks_of_odd_shapes(tmp_path: Path, shape: tuple[int, int]) -> None:
    grid = Grid.of("EPSG:32618", (0.5, 0, 500_000, 0, -0.5, 4_000_000), shape)
    heights = np.linspace(0, 30, shape[0] * shape[1], dtype=np.float32).reshape(1, *shape)
    with CogWriter(tmp_path / "chm.tif", grid, [BandSpec("canopy_height", "m")]) as writer:
        writer.write(heights, np.ones(shape, bool))
    write_quicklook(tmp_path / "chm.tif", tmp_path / "chm.png", title="a map")
    assert (tmp_path / "chm.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chm.png", "chm.tif"]


def test_a_map_without_heights_still_has_a_picture(tmp_path: Path) -> None:
    grid = Grid.of("EPSG:32618", (0.5, 0, 500_000, 0, -0.5, 4_000_000), (20, 20))
    with CogWriter(tmp_path / "chm.tif", grid, [BandSpec("canopy_height", "m")]):
        pass
    write_quicklook(tmp_path / "chm.tif", tmp_path / "chm.png", title="nothing")
    assert (tmp_path / "chm.png").is_file()


def test_names_in_tags_have_no_folders_and_no_signatures() -> None:
    for name, ids, text in (
        ("/data/in/a.tif", ("/data/in/a.tif",), "a.tif"),
        ("/in/a.tif and 1 more", ("/in/a.tif", "/in/b.tif"), "a.tif, b.tif"),
        ("naip", ("https://host/a.tif?sig=secret",), "naip: https://host/a.tif"),
        ("naip", (), "naip"),
    ):
        assert output.imagery_text(Scenes(name, ids, ())) == text
    many = Scenes("folder", tuple(f"{i}.tif" for i in range(50)), ())
    assert output.imagery_text(many).endswith("19.tif and 30 more")


def test_default_names() -> None:
    assert output.default_out(["x/forest.jp2"], None) == "forest_chm.tif"
    assert output.default_out(["https://host/a/b.tif?sig=1"], None) == "b_chm.tif"
    assert output.default_out([], "naip") == "naip_chm.tif"
    assert output.default_out([], "https://host/{z}/{x}/{y}.png") == "chm.tif"
    assert output.default_out(["a.tif", "b.tif"], None) == "chm.tif"


def test_outputs_must_be_geotiffs(tmp_path: Path) -> None:
    (tmp_path / "folder.tif").mkdir()
    for name in (tmp_path, tmp_path / "folder.tif", tmp_path / "chm.png", tmp_path / "chm"):
        with pytest.raises(InputError, match=r"expected a file name ending in \.tif"):
            canopy.predict("image.tif", out=name)
