"""A region made in tiles is the map made at once, byte for byte; its outputs open; its run goes on, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from shapely.geometry import Point

from canopy.errors import InputError, OutputError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.raster import read_raster
from canopy.inference.options import OneMapOptions
from canopy.inference.predict import prepare
from canopy.region.ledger import Ledger
from canopy.region.plan import RegionSettings, request_of
from canopy.region.publish import PublishedLayout, write_mosaic, write_published
from canopy.region.run import RunResult, prepare_run, start, status
from canopy.region.task import Outcome, tile_path
from canopy.region.tiles import TileTask

Make = Callable[..., RegionSettings]


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Heights agree to the last bit at equal threads, and the runs here are pinned to one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(settings: RegionSettings, inline: type, **more: object) -> RunResult:
    prepared = prepare_run(settings, **{k: more.pop(k) for k in ("resume", "overwrite") if k in more})  # type: ignore[arg-type]
    return start(prepared, engine=more.pop("engine", inline), **more)  # type: ignore[arg-type]


def at_once(settings: RegionSettings, out: Path) -> np.ndarray:
    """The stored pixels of one `canopy predict` over the region."""
    crs = "quadkey" if settings.grid == "quadkey" else settings.crs
    given = {**request_of(settings).model_dump(), "out": str(out), "crs": crs}
    prepare(OneMapOptions(**given), area=settings.area()).run()
    with rasterio.open(out) as dataset:
        return dataset.read()


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "tiles").glob("*.tif")}


@pytest.mark.parametrize(
    "more",
    [
        {"grid": "utm"},
        {"grid": "quadkey", "zoom": 20},
        {"grid": "utm", "gsd": 2.0, "zoom": 18, "tile_px": 64, "date_band": True},
    ],
    ids=["utm", "quadkey", "coarser"],
)
def test_a_region_is_the_map_made_at_once(settings: Make, inline: type, tmp_path: Path, more: dict) -> None:
    wish = settings(**more)
    result = run(wish, inline)
    expected = at_once(wish, tmp_path / "once.tif")
    assert result.exit_code == 0 and result.counts["done"] >= 2
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic, rasterio.open(tmp_path / "once.tif") as once:
        assert mosaic.transform == once.transform and mosaic.crs == once.crs and mosaic.units == once.units
        assert mosaic.descriptions == once.descriptions
        assert mosaic.read().tobytes() == expected.tobytes()
    assert np.nanstd(expected[0]) > 0.1 and np.isnan(expected[0]).any()


def test_a_finished_run_starts_no_worker_and_a_lost_tile_is_made_again(
    settings: Make, inline: type, tmp_path: Path
) -> None:
    run(settings(), inline)
    before, outputs = hashes(tmp_path / "run"), (tmp_path / "run" / "catalog.json").stat().st_mtime_ns

    def nobody(how: object) -> object:
        raise AssertionError("a finished run must not start workers")

    again = run(settings(), inline, engine=nobody)
    assert again.tally.finished == 0 and again.exit_code == 0
    assert (tmp_path / "run" / "catalog.json").stat().st_mtime_ns == outputs
    victim, damaged = sorted(before)[:2]
    (tmp_path / "run" / "tiles" / victim).unlink()
    with (tmp_path / "run" / "tiles" / damaged).open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"something")
    result = run(settings(out=str(tmp_path / "run")), inline, verify=True, resume=True)
    assert result.tally.done == 2 and hashes(tmp_path / "run") == before


def test_a_changed_run_is_refused(settings: Make, inline: type, image: Path, tmp_path: Path) -> None:
    run(settings(), inline)
    ledger = (tmp_path / "run" / "ledger.sqlite").read_bytes()
    with pytest.raises(InputError, match=r"map\.encoding was .float32. and is .uint16cm."):
        prepare_run(settings(encoding="uint16cm"))
    other = tmp_path / "texture.tif"
    shutil.copy(image, other)
    prepare_run(settings(images=(str(other),)))  # the same imagery in another place
    with rasterio.open(other, "r+") as dataset:
        dataset.write(np.full((3, 10, 10), 50, np.uint8), window=((0, 10), (0, 10)))
    with pytest.raises(InputError, match=r"imagery\.sha256 was"):
        prepare_run(settings(images=(str(other),)))
    with pytest.raises(InputError, match=r"model\.sha256"):
        prepare_run(settings(model="default"))
    assert (tmp_path / "run" / "ledger.sqlite").read_bytes() == ledger
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="no run"):
        prepare_run(settings(out=str(tmp_path / "mine")))


def test_shards_make_the_same_run(settings: Make, inline: type, tmp_path: Path) -> None:
    whole = run(settings(out=str(tmp_path / "whole")), inline)
    parts = [run(settings(shard=f"{i}/3"), inline) for i in (2, 3, 1)]
    assert [bool(part.outputs) for part in parts] == [False, False, True]
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")
    assert status(tmp_path / "run")["tiles"] == whole.counts
    assert (tmp_path / "run" / "mosaic").read_bytes() == (tmp_path / "whole" / "mosaic").read_bytes()


def test_failures_are_journaled_and_leave_a_hole_not_a_wrong_pixel(
    settings: Make, inline: type, tmp_path: Path
) -> None:
    prepared = prepare_run(settings())
    tasks = list(prepared.tiling.tiles(prepared.aoi))
    bad = tasks[1]

    def broken(task: TileTask) -> Outcome | None:
        return Outcome(task, "failed", "h", reason="the host is gone") if task.id == bad.id else None

    result = start(prepared, engine=lambda how: inline(how, broken))
    assert result.exit_code == 3 and result.failures == [(bad.id, "the host is gone")]
    top, left, height, width = prepared.tiling.offset(bad.row, bad.col)
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic:
        hole = mosaic.read(1, window=((top, top + height), (left, left + width)))
        assert np.isnan(hole).all() and np.isfinite(mosaic.read(1)).any()
    assert run(settings(), inline).exit_code == 3  # failures stay until asked to be tried again
    assert run(settings(), inline, retry_failed=True).exit_code == 0


def test_tiles_without_imagery_cost_nothing(settings: Make, inline: type, tmp_path: Path) -> None:
    engines = []

    def engine(how: object) -> object:
        engines.append(inline(how))
        return engines[-1]

    # The area is larger than the image: tiles beyond it never become a task.
    area = "499990,4881850,500300,4882100"
    result = run(settings(bounds=area, bounds_crs="EPSG:32618"), inline, engine=engine)
    assert result.counts["empty"] > 0 and result.counts["failed"] == 0
    assert len(engines[0].made) < sum(result.counts.values())
    assert len(hashes(tmp_path / "run")) == result.counts["done"]


def test_a_polygon_is_mapped_inside_only(settings: Make, inline: type, tmp_path: Path) -> None:
    import geopandas

    disc = Point(500_060, 4_881_950).buffer(40)
    geopandas.GeoDataFrame(geometry=[disc], crs="EPSG:32618").to_file(tmp_path / "disc.gpkg")
    run(settings(aoi=str(tmp_path / "disc.gpkg")), inline)
    found = read_raster(tmp_path / "run" / "mosaic.vrt")
    inside = AOI(disc, to_crs("EPSG:32618")).mask(found.grid)
    assert found.valid[inside].any() and not found.valid[~inside].any()


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    settings: Make, inline: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shutil.disk_usage, []

    def full(path: object) -> object:
        calls.append(path)
        return real(path)._replace(free=0) if len(calls) >= 3 else real(path)  # type: ignore[type-var]

    monkeypatch.setattr("canopy.geo.cog.shutil.disk_usage", full)
    with pytest.raises(OutputError, match=r"free on the disk.*run the same command again"):
        run(settings(), inline)
    monkeypatch.setattr("canopy.geo.cog.shutil.disk_usage", real)
    assert len(hashes(tmp_path / "run")) == 2
    for path in (tmp_path / "run" / "tiles").glob("*.tif"):
        rasterio.open(path).read()
    assert run(settings(), inline).exit_code == 0
    assert not [p for p in (tmp_path / "run" / "tiles").iterdir() if p.name.startswith(".")]


def test_many_tiles_are_found_through_an_index(settings: Make, inline: type, tmp_path: Path) -> None:
    prepared = prepare_run(settings())
    start(prepared, engine=inline)
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic:
        expected = mosaic.read()
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        write_mosaic(ledger, prepared, tmp_path / "run", most_vrt=1)
    assert (tmp_path / "run" / "index.gti.gpkg").is_file()
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic:
        assert mosaic.read().tobytes() == expected.tobytes()


def test_overviews_of_the_whole_region_show_it(settings: Make, tmp_path: Path, inline: type) -> None:
    from canopy.region import publish as module

    prepared = prepare_run(settings())
    start(prepared, engine=inline)
    folder = tmp_path / "run"
    assert not (folder / "overview.tif").exists()  # 240 px need none
    made = module.write_overview(
        folder / "mosaic", folder / "overview.tif", prepared.tiling.area, "float32", prepared.bands
    )
    assert not made


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_the_published_layout(settings: Make, inline: type, tmp_path: Path, name: str) -> None:
    prepared = prepare_run(settings(grid="quadkey", zoom=20))
    start(prepared, engine=inline)
    # Smaller tiles than the real zooms 9 and 10, on the same pixel.
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        folder = write_published(ledger, prepared, PublishedLayout(name, 16))
    fine = read_raster(tmp_path / "run" / "mosaic.vrt")
    features = json.loads((folder / "tiles.geojson").read_text())["features"]
    assert features and len(list((folder / "chm").glob("*.tif"))) == len(features)
    mapped = 0
    for feature in features:
        quadkey = feature["properties"]["tile"]
        with rasterio.open(folder / "chm" / f"{quadkey}.tif") as dataset:
            assert (
                dataset.dtypes == ("uint8",) and dataset.crs.to_epsg() == 3857 and dataset.shape == (512, 512)
            )
            assert dataset.transform.a == pytest.approx(1.194329, abs=1e-6)
            heights, transform = dataset.read(1), dataset.transform
        valid = heights != 255
        mapped += int(valid.sum())
        if name == "v1":
            with rasterio.open(folder / "msk" / f"{quadkey}.tif.msk") as dataset:
                assert np.array_equal(dataset.read(1) == 255, ~valid)
            dated = json.loads((folder / "metadata" / f"{quadkey}.geojson").read_text())["features"][0]
            assert dated["properties"]["acq_date"] in ("2021-06-15", None)
        else:
            with rasterio.open(folder / "metadata" / f"{quadkey}.tif") as dataset:
                years = dataset.read(1)
            assert (years[valid] == 21).all() and (years[~valid] == 255).all()
        if valid.any():
            row, col = (int(v) for v in np.argwhere(valid)[valid.sum() // 2])
            x, y = transform * (col, row)
            r, c = (round(v) for v in fine.grid.rowcol(x, y))
            k = round(transform.a / fine.grid.pixel[0])
            block, known = fine.values[0, r : r + k, c : c + k], fine.valid[r : r + k, c : c + k]
            assert heights[row, col] == np.rint(block[known].mean())
    assert mapped > 1000


def test_an_image_that_is_cut_short_fails_its_tiles_only(
    settings: Make, inline: type, image: Path, tmp_path: Path
) -> None:
    with rasterio.open(image) as dataset:
        pixels, profile = dataset.read(), dataset.profile
    profile |= {"compress": "deflate", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 4_882_000)}
    broken = tmp_path / "broken.tif"
    with rasterio.open(broken, "w", **profile) as dataset:
        dataset.write(pixels)
    with broken.open("r+b") as file:  # the header is whole and opens; the last blocks are not there
        file.truncate(broken.stat().st_size * 2 // 3)
    result = run(settings(images=(str(broken),)), inline)
    assert result.exit_code == 3 and 0 < result.counts["failed"] < sum(result.counts.values())
    assert all("broken.tif" in reason for _, reason in result.failures)
    for tile, _ in result.failures:
        assert not tile_path(tmp_path / "run", tile).exists()


def test_more_images_than_one_mosaic_may_have_are_opened_in_parts(
    settings: Make, inline: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from canopy.imagery.stac import TooManyItemsError
    from canopy.inference import predict as job

    area = {"bounds": "500000,4881900,500120,4882000", "bounds_crs": "EPSG:32618"}
    run(settings(out=str(tmp_path / "whole"), **area), inline)
    real, asked = job.open_source, []

    def limited(options: OneMapOptions, gsd_m: float, area: AOI) -> object:
        asked.append(area)
        if len(asked) in (1, 3):  # the whole area: by the driver, and by the worker
            raise TooManyItemsError("more than 2000 items there")
        return real(options, gsd_m, area)

    monkeypatch.setattr(job, "open_source", limited)
    monkeypatch.setattr("canopy.region.plan.PLACE_M", 20.0)
    result = run(settings(**area), inline)
    assert result.exit_code == 0 and len(asked) > 4
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_short_memory_halves_the_batch_once_for_all_tiles(
    settings: Make, inline: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from canopy.inference.backends import TorchRunner

    expected = at_once(settings(backend="torch"), tmp_path / "once.tif")
    real, refused = TorchRunner.forward, []

    def forward(self: TorchRunner, crops: torch.Tensor) -> torch.Tensor:
        if len(crops) > 1:
            refused.append(len(crops))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, crops)

    monkeypatch.setattr(TorchRunner, "forward", forward)
    result = run(settings(batch_size=4, backend="torch"), inline)
    assert result.exit_code == 0 and refused == [4, 2]
    with Ledger(tmp_path / "run" / "ledger.sqlite", read_only=True) as ledger:
        notes = [row.facts["notes"] for row in ledger.rows("done") if "notes" in row.facts]
    assert len(notes) == 1 and "batch size reduced to 1" in notes[0][-1]
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic:
        np.testing.assert_allclose(mosaic.read(), expected, atol=1e-3)
