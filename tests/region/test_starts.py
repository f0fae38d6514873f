"""Starts that are refused, and what a start settles: pins, shards, tiles' sides, costs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

from canopy.errors import ConfigError, DataError, InputError
from canopy.imagery.open import open_imagery
from canopy.inference.layers import Extras
from canopy.models.heads import IntervalTable
from canopy.region.plan import RegionSettings, absolute, imagery_fingerprint
from canopy.region.run import prepare_run, region_cost, start

Make = Callable[..., RegionSettings]


def run(settings: RegionSettings, inline: type, overwrite: bool = False) -> None:
    start(prepare_run(settings, overwrite=overwrite), overwrite=overwrite, engine=inline)


def test_going_on_refuses_what_differs_and_takes_the_rest(
    settings: Make, inline: type, tmp_path: Path
) -> None:
    run(settings(encoding="uint16cm"), inline)
    out = str(tmp_path / "run")
    pinned = prepare_run(RegionSettings(out=out), resume=True)
    assert pinned.settings.encoding == "uint16cm" and pinned.settings.zoom == 19
    prepare_run(settings(encoding="uint16cm", backend="auto"), resume=True)  # all of it said again
    for wish, message in [
        ({"encoding": "float32"}, r"map\.encoding was .uint16cm. and is .float32."),  # the default, but said
        ({"interval": 0.9, "model": "default"}, r"model\.sha256"),
        ({"imagery": "demo"}, r"imagery\.sha256|no image"),
        ({"bounds": "500000,4881950,500060,4882000", "bounds_crs": "EPSG:32618"}, r"area\.text"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_run(RegionSettings(out=out, **wish), resume=True)


def test_only_the_images_are_the_imagery(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(image, folder / "a.tif")

    def pin(name: str) -> str:
        return imagery_fingerprint([absolute(name, ["demo"])], open_imagery(name))

    before = pin(str(folder))
    (folder / "map").mkdir()
    (folder / "map" / "run.json").write_text("{}")
    (folder / "a.tif.aux.xml").write_text("<PAMDataset/>")
    assert pin(str(folder)) == before
    with rasterio.open(folder / "a.tif", "r+") as dataset:
        dataset.write(np.full((3, 10, 10), 50, np.uint8), window=((0, 10), (0, 10)))
    assert pin(str(folder)) != before
    monkeypatch.chdir(tmp_path)
    named = pin("demo")
    (tmp_path / "demo").mkdir()  # as `make demo` leaves one
    (tmp_path / "demo" / "texture.tif").write_bytes(image.read_bytes())
    assert pin("demo") == named


def test_a_shard_never_clears_the_folder_of_all(settings: Make, inline: type, tmp_path: Path) -> None:
    run(settings(shard="1/2"), inline)
    folder = tmp_path / "run"
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match="--overwrite with --shard"):
        run(settings(shard="2/2"), inline, overwrite=True)
    with pytest.raises(ConfigError, match="--overwrite with --shard"):
        start(prepare_run(settings(shard="2/2")), overwrite=True, engine=inline)
    assert list(folder.glob("tiles/*.tif")) and sorted(folder.rglob("*")) == before


def test_the_last_shard_says_why_there_are_no_outputs(settings: Make, inline: type, tmp_path: Path) -> None:
    run(settings(shard="1/2"), inline)
    (tmp_path / "run" / "ledger.sqlite").write_text("something else, long enough to be looked at" * 40)
    with pytest.raises(DataError, match="no ledger"):
        run(settings(shard="2/2"), inline)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_size": "many"}, "'many' is no batch size"),
        ({"batch_size": 0}, "0 is no batch size"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "xpu", "backend": "torch"}, "unknown device 'xpu'"),
    ],
)
def test_a_bad_engine_option_is_told_before_any_tile(settings: Make, more: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_run(settings(**more))


def test_tiles_in_feet_are_as_large_as_those_in_metres(settings: Make) -> None:
    metres = prepare_run(settings(zoom=14, tile_px=32768)).tiling
    feet = prepare_run(settings(zoom=14, tile_px=32768, crs="EPSG:2263")).tiling
    assert feet.tile_px == pytest.approx(metres.tile_px, abs=1)


@pytest.mark.parametrize(("method", "views"), [("spread", 1), ("flips", 8)])
def test_the_cost_is_that_of_every_view_of_a_crop(settings: Make, method: str, views: int) -> None:
    prepared = prepare_run(settings(backend="torch"))
    knots = np.array([0.0, 10.0])
    table = IntervalTable(
        np.array([0.9]), knots, knots, knots, np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), {}, method
    )
    passes = []
    first = next(prepared.model.children())
    first.register_forward_hook(lambda *_: passes.append(1))
    cost = region_cost(replace(prepared, extras=Extras(interval=table)))
    assert len(passes) == 2 * views and cost.hours > 0
