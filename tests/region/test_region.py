"""A region made in tiles is the map made at once; its outputs open; its run goes on and says what changed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
from servers import Server
from shapely.geometry import Point, mapping

from canopy.errors import CanopyError, ConfigError, FetchError, ImageryError, InputError, OutputError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.reading import read_raster
from canopy.imagery.open import open_imagery
from canopy.inference.options import OneMapOptions, PredictOptions
from canopy.inference.predict import prepare
from canopy.region import workers
from canopy.region.options import MapOptions
from canopy.region.plan import fingerprint, region_cost
from canopy.region.run import prepare_run, status
from canopy.region.tiles import Tile, tile_path

Make = Callable[..., MapOptions]


def at_once(options: MapOptions, out: Path) -> np.ndarray:
    """The stored pixels of one `canopy predict` over the region."""
    given = {name: getattr(options, name) for name in PredictOptions.model_fields}
    prepare(OneMapOptions(**given | {"out": str(out)})).run()
    with rasterio.open(out) as dataset:
        return dataset.read()


def check_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """The same mask, and the same values to a hundredth."""
    assert found.shape == expected.shape and np.array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=0.01, rtol=0)


def test_a_coarser_region_is_the_map_made_at_once(options: Make, make_run: Callable, tmp_path: Path) -> None:
    """On the model's own grid and on that of quadkeys: tests/behaviour/test_map.py."""
    wish = options(gsd=2.0, zoom=18, tile_px=64, date_band=True)
    result, expected = make_run(wish), at_once(wish, tmp_path / "once.tif")
    assert result.exit_code == 0 and result.counts["done"] >= 2
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic, rasterio.open(tmp_path / "once.tif") as once:
        assert mosaic.transform == once.transform and mosaic.crs == once.crs and mosaic.units == once.units
        assert mosaic.descriptions == once.descriptions
        check_equal(mosaic.read(), expected)
    assert np.nanstd(expected[0]) > 0.1 and np.isnan(expected[0]).any()


def test_a_finished_run_starts_no_worker_and_a_lost_tile_is_made_again(
    options: Make, make_run: Callable, hashes: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(options())
    before, outputs = hashes(tmp_path / "run"), (tmp_path / "run" / "catalog.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("canopy.region.run.make_tiles", None)  # who would start workers fails
        again = make_run(options())
    assert again.made.total() == 0 and again.exit_code == 0
    assert (tmp_path / "run" / "catalog.json").stat().st_mtime_ns == outputs
    gone, short = ((tmp_path / "run" / "tiles" / name) for name in sorted(before)[:2])
    gone.unlink()
    os.truncate(short, 1000)
    result = make_run(MapOptions(out=str(tmp_path / "run")), resume=True)
    assert result.made["done"] == 2 and hashes(tmp_path / "run") == before


# ---- what a run is pinned to ------------------------------------------------------------------
def test_going_on_refuses_what_differs_and_takes_the_rest(
    options: Make, make_run: Callable, image: Path, tmp_path: Path
) -> None:
    make_run(options(encoding="uint16cm"))
    out = str(tmp_path / "run")
    ledger = (tmp_path / "run" / "ledger.sqlite").read_bytes()
    taken = prepare_run(MapOptions(out=out), resume=True)
    assert taken.options.encoding == "uint16cm" and taken.options.zoom == 19
    prepare_run(options(encoding="uint16cm", backend="auto"), resume=True)  # all of it said again
    for more, message in [
        ({"encoding": "float32"}, r"map\.encoding was .uint16cm. and is .float32."),  # the default, but said
        ({"gsd": 1.0}, r"map\.gsd was null and is 1\.0"),
        ({"model": "default"}, r"model\.sha256 was"),
        ({"imagery": "demo"}, r"imagery\.sha256|no image"),
        ({"bounds": "500000,4881950,500060,4882000", "bounds_crs": "EPSG:32618"}, r"area\.text was"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_run(MapOptions(out=out, **more), resume=True)
    with pytest.raises(InputError, match=r"map\.encoding was .uint16cm. and is .float32."):
        prepare_run(options())
    other = tmp_path / "texture.tif"
    shutil.copy(image, other)
    prepare_run(options(images=(str(other),), encoding="uint16cm"))  # the same imagery in another place
    with rasterio.open(other, "r+") as dataset:
        dataset.write(np.full((3, 10, 10), 50, np.uint8), window=((0, 10), (0, 10)))
    with pytest.raises(InputError, match=r"imagery\.sha256 was"):
        prepare_run(options(images=(str(other),), encoding="uint16cm"))
    assert (tmp_path / "run" / "ledger.sqlite").read_bytes() == ledger
    run_file = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run_file["imagery"]["pin"]["kind"] == "scenes" and run_file["settled"]["backend"] == "torch"


def test_a_scene_that_is_published_meanwhile_changes_nothing(
    options: Make, make_run: Callable, image: Path, tmp_path: Path
) -> None:
    """Workers and later starts read the pinned list; a new search would find the newer scene on top."""
    with rasterio.open(image) as dataset:
        west, south, east, north = rasterio.warp.transform_bounds(dataset.crs, 4326, *dataset.bounds)
    outline = [[west, south], [east, south], [east, north], [west, north], [west, south]]

    def item(name: str, path: Path, day: str) -> None:
        facts = {
            "type": "Feature", "stac_version": "1.0.0", "id": name, "bbox": [west, south, east, north],
            "geometry": {"type": "Polygon", "coordinates": [outline]}, "links": [],
            "properties": {"datetime": f"{day}T10:00:00Z"},
            "assets": {"visual": {"href": str(path), "type": "image/tiff; application=geotiff"}},
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
        links = [{"rel": "item", "href": f"./{p.name}"} for p in sorted(tmp_path.glob("scene-*.json"))]
        catalog = {"type": "Catalog", "stac_version": "1.0.0", "id": "c", "description": "d", "links": links}
        (tmp_path / "catalog.json").write_text(json.dumps(catalog))

    item("scene-old", image, "2021-06-15")
    wish = {
        "images": (), "imagery": str(tmp_path / "catalog.json"),
        "bounds": "500000,4881900,500120,4882000", "bounds_crs": "EPSG:32618",
    }  # fmt: skip
    make_run(options(out=str(tmp_path / "whole"), **wish))
    make_run(options(shard="1/2", **wish))
    black = tmp_path / "black.tif"
    with rasterio.open(image) as dataset, rasterio.open(black, "w", **dataset.profile) as copy:
        copy.write(np.full_like(dataset.read(), 20))
    item("scene-new", black, "2024-06-15")
    result = make_run(options(**wish))
    assert result.exit_code == 0 and result.made["done"] > 0
    with rasterio.open(tmp_path / "run" / "mosaic") as run, rasterio.open(tmp_path / "whole/mosaic") as at:
        check_equal(run.read(), at.read())


def test_only_the_images_are_the_imagery(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(image, folder / "a.tif")
    before = fingerprint([str(folder)], open_imagery(str(folder)))
    (folder / "map").mkdir()
    (folder / "map" / "run.json").write_text("{}")
    (folder / "a.tif.aux.xml").write_text("<PAMDataset/>")
    assert fingerprint([str(folder)], open_imagery(str(folder))) == before
    with rasterio.open(folder / "a.tif", "r+") as dataset:
        dataset.write(np.full((3, 10, 10), 50, np.uint8), window=((0, 10), (0, 10)))
    assert fingerprint([str(folder)], open_imagery(str(folder))) != before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_size": 0}, "0 is no batch size"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"shard": "5/3"}, "I/N"),
    ],
)
def test_a_bad_option_is_told_before_any_tile(options: Make, more: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_run(options(**more))


def test_folders_that_are_no_runs(options: Make, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for out in (tmp_path / "mine", tmp_path / "mine" / "letter.txt"):
        with pytest.raises(InputError, match=r"no run|is a file"):
            prepare_run(options(out=str(out)))
    with pytest.raises(InputError, match="no run to go on with"):
        prepare_run(options(), resume=True)


# ---- shards -----------------------------------------------------------------------------------
def test_shards_make_the_same_run(
    options: Make, make_run: Callable, hashes: Callable, tmp_path: Path
) -> None:
    whole = make_run(options(out=str(tmp_path / "whole")))
    made = [make_run(options(shard=shard)).made["done"] for shard in ("2/3", "3/3")]
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match="--overwrite with --shard"):  # it would clear the others' tiles
        make_run(options(shard="1/3"), overwrite=True)
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert status(tmp_path / "run")["tiles"]["done"] == sum(made) > 0
    result = make_run(MapOptions(out=str(tmp_path / "run")), resume=True)  # takes over, and makes the rest
    assert result.made["done"] == whole.counts["done"] - sum(made) > 0
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")
    assert status(tmp_path / "run")["tiles"] == whole.counts
    with rasterio.open(tmp_path / "run" / "mosaic") as run, rasterio.open(tmp_path / "whole/mosaic") as at:
        assert run.read().tobytes() == at.read().tobytes()


# ---- faults -----------------------------------------------------------------------------------
def test_damaged_imagery_fails_its_tiles_only_and_leaves_a_hole_not_a_wrong_pixel(
    options: Make, make_run: Callable, image: Path, tmp_path: Path
) -> None:
    with rasterio.open(image) as dataset:
        pixels, profile = dataset.read(), dataset.profile | {"compress": "deflate"}
    broken = tmp_path / "broken.tif"
    with rasterio.open(broken, "w", **profile) as dataset:
        dataset.write(pixels)
    whole = broken.read_bytes()
    with broken.open("r+b") as file:  # the header is whole and opens; the last blocks are not there
        file.truncate(len(whole) * 2 // 3)
    result = make_run(options(images=(str(broken),)))
    assert result.exit_code == 3 and 0 < result.counts["failed"] < sum(result.counts.values())
    assert result.made["retried"] == 0  # bad input stays bad
    assert all("broken.tif" in reason for _, reason in result.failures)
    expected = at_once(options(), tmp_path / "once.tif")
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic:
        found = mosaic.read()
    made = np.isfinite(found)
    np.testing.assert_allclose(found[made], expected[made], atol=0.01)
    assert made.any() and (np.isfinite(expected) & ~made).any()
    for tile, _ in result.failures:
        assert not tile_path(tmp_path / "run", tile).exists()
    assert make_run(options(images=(str(broken),))).exit_code == 3  # failures stay until asked for
    again = make_run(options(images=(str(broken),)), retry_failed=True)
    assert again.exit_code == 3 and again.made["failed"] == len(result.failures)


def test_tiles_without_imagery_cost_nothing(
    options: Make, make_run: Callable, hashes: Callable, tmp_path: Path
) -> None:
    # The area is larger than the image: tiles beyond it never become a task.
    result = make_run(options(bounds="499990,4881850,500300,4882100", bounds_crs="EPSG:32618"))
    assert result.counts["empty"] > 0 and result.counts["failed"] == 0
    assert result.made.total() < sum(result.counts.values())
    assert len(hashes(tmp_path / "run")) == result.counts["done"]
    # An area without a valid pixel is a run too.
    hole = {"bounds": "500052,4881964,500063,4881969", "bounds_crs": "EPSG:32618"}
    result = make_run(options(out=str(tmp_path / "hole"), **hole))
    assert result.counts["empty"] == 1 == sum(result.counts.values()) and result.exit_code == 0
    with rasterio.open(tmp_path / "hole" / "mosaic.vrt") as mosaic:
        assert np.isnan(mosaic.read()).all()


def test_a_polygon_is_mapped_inside_only(options: Make, make_run: Callable, tmp_path: Path) -> None:
    import geopandas

    disc = Point(500_060, 4_881_950).buffer(40)
    geopandas.GeoDataFrame(geometry=[disc], crs="EPSG:32618").to_file(tmp_path / "disc.gpkg")
    make_run(options(aoi=str(tmp_path / "disc.gpkg")))
    found = read_raster(tmp_path / "run" / "mosaic.vrt")
    inside = AOI(disc, to_crs("EPSG:32618")).mask(found.grid)
    assert found.valid[inside].any() and not found.valid[~inside].any()


def test_more_images_than_one_mosaic_may_have_are_opened_by_tile(
    options: Make, make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from canopy.imagery.stac import TooManyItemsError
    from canopy.region import plan

    area = {"bounds": "500000,4881900,500120,4882000", "bounds_crs": "EPSG:32618"}
    make_run(options(out=str(tmp_path / "whole"), **area))
    real = plan.open_source

    def limited(wish: PredictOptions, gsd_m: float, place: AOI | None) -> object:
        if place is not None and place.describe() == options(**area).area().describe():
            raise TooManyItemsError("more than 2000 items there")
        return real(wish, gsd_m, place)

    monkeypatch.setattr(plan, "open_source", limited)
    result = make_run(options(**area))
    assert result.exit_code == 0 and any("more images" in note for note in result.notes)
    with rasterio.open(tmp_path / "run" / "mosaic") as run, rasterio.open(tmp_path / "whole/mosaic") as at:
        check_equal(run.read(), at.read())


def test_a_static_catalog_is_walked_once_a_run_and_its_terms_are_on_every_tile(
    options: Make, make_run: Callable, image: Path, server: Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "manifests" / "imagery"
    folder.mkdir(parents=True)
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder.parent))
    server.put("/image.tif", image.read_bytes())
    with open_imagery(image) as source:
        place = source.area().lonlat
    assets = {"visual": {"href": "./image.tif", "type": "image/tiff"}}
    item = {"type": "Feature", "id": "a", "geometry": mapping(place), "assets": assets}
    item["properties"] = {"datetime": "2021-06-15T10:00:00Z"}
    links = [{"rel": "item", "href": f"./{name}.json"} for name in ("a", "lost")]
    server.put("/a.json", item)
    server.put("/catalog.json", {"type": "Catalog", "id": "c", "links": links})
    west, south, east, north = place.bounds
    (folder / "mine.yaml").write_text(
        f"name: mine\ntitle: t\nkind: stac\nhref: {server.url}/catalog.json\ngsd_m: 0.5\n"
        "licence: CC BY-NC 4.0\nattribution: The Flyers\ndates: 2021/2021\n"
        f"coverage: [{west}, {south}, {east}, {north}]\n"
    )
    area = {"bounds": "500000,4881900,500120,4882000", "bounds_crs": "EPSG:32618"}
    wish = options(images=(), imagery="mine", **area)
    result = make_run(wish)
    assert result.counts["done"] >= 4 and any("lost.json" in note for note in result.notes)
    make_run(wish)  # the same again: nothing to do, and nothing is searched
    assert [server.asked(name) for name in ("catalog.json", "/a.json", "lost.json")] == [1, 1, 1]
    described = json.loads((tmp_path / "run" / "collection.json").read_text())
    assert described["license"] == "CC-BY-NC-4.0" and described["providers"][0]["name"] == "The Flyers"
    for tile in (tmp_path / "run" / "tiles").glob("*.tif"):
        with rasterio.open(tile) as made:
            tags = made.tags()
        assert tags["CANOPY_IMAGERY_ATTRIBUTION"] == "The Flyers" and tags["CANOPY_COMMERCIAL_USE"] == "no"
        assert json.loads(tile.with_suffix(".json").read_text())["properties"]["license"] == "CC-BY-NC-4.0"


def test_a_tile_is_read_from_no_other_source_than_its_run(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every tile opens its own images, a stand-in for a host that is down would be a patchwork."""
    from canopy.region import plan

    region = dataclasses.replace(plan.open_region(options()), by_tile=True)
    tile = next(iter(region.tiling.tiles(region.inputs.aoi)))
    assert region.inputs_of(tile).source.name == region.inputs.source.name
    other = plan.open_source(region.options, 0.5, region.inputs.aoi)
    other.name = "second"
    monkeypatch.setattr(plan, "open_source", lambda *_: other)
    with pytest.raises(FetchError, match="does not answer now"):
        region.inputs_of(tile)


def test_what_a_server_refuses_for_now_is_tried_again_later(
    options: Make, make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = workers.predict_tile, []

    def make(region: object, runner: object, tile: Tile) -> object:
        tried.append(tile.ordinal)
        if tile.ordinal == 1 or (tile.ordinal == 2 and tried.count(2) == 1):
            raise FetchError("answers 503", where="https://host/a.tif")
        return real(region, runner, tile)

    monkeypatch.setattr(workers, "predict_tile", make)
    result = make_run(options(attempts=2))
    assert result.exit_code == 3 and result.made["retried"] == 2 and tried[-2:] == [1, 2]
    assert [why for _, why in result.failures] == ["https://host/a.tif: answers 503 (after 2 tries)"]


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    options: Make, make_run: Callable, hashes: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shutil.disk_usage, []

    def full(path: object) -> object:
        calls.append(path)
        return real(path)._replace(free=0) if len(calls) >= 3 else real(path)  # type: ignore[type-var]

    with monkeypatch.context() as patch:
        patch.setattr("canopy.geo.cog.shutil.disk_usage", full)
        with pytest.raises(OutputError, match=r"free on the disk.*run the same command again"):
            make_run(options())
    assert len(hashes(tmp_path / "run")) == 2
    for path in (tmp_path / "run" / "tiles").glob("*.tif"):
        rasterio.open(path).read()
    assert make_run(options()).exit_code == 0
    assert not [p for p in (tmp_path / "run" / "tiles").iterdir() if p.name.startswith(".")]


def test_a_worker_that_does_not_find_the_run_ends_it(
    options: Make, make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("canopy.region.run.run_id", lambda pins: "another")
    with pytest.raises(InputError, match="Workers need the same folder"):
        make_run(options())
    counts = dict(sqlite3.connect(tmp_path / "run" / "ledger.sqlite").execute("SELECT state, 1 FROM tiles"))
    assert set(counts) <= {"pending", "running"}


def test_no_scheduler_there(options: Make, make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("canopy.region.workers.CONNECT_S", 1.0)
    with pytest.raises(CanopyError, match="no scheduler with a worker there"):
        make_run(options(scheduler="tcp://127.0.0.1:1"))


def test_the_cost_is_that_of_the_crops(options: Make, make_run: Callable) -> None:
    one, two = region_cost(prepare_run(options(price=2.0))), region_cost(prepare_run(options(workers=2)))
    assert one["crops"] == two["crops"] > one["tiles"]
    assert two["hours"] == pytest.approx(two["worker_hours"] / 2)
    assert one["money"] == pytest.approx(2 * one["worker_hours"])
    made = make_run(options())
    assert made.counts["done"] == one["tiles"] and made.totals["km2"] == pytest.approx(one["km2"])


def test_images_that_are_skipped_are_in_no_pin(
    options: Make, make_run: Callable, image: Path, tmp_path: Path
) -> None:
    """Workers and later starts open what was readable when the run began, whatever has become of the rest."""
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(image, folder / "whole.tif")
    link = folder / "link.tif"
    link.symlink_to("nowhere.tif")
    with pytest.raises(ImageryError, match=r"link\.tif.*--on-damaged skip"):
        prepare_run(options(images=(str(folder),)))
    wish = options(images=(str(folder),), on_damaged="skip")
    region = prepare_run(wish)
    scenes = region.pins["imagery"]["pin"]["scenes"]
    assert [Path(scene["scene_id"]).name for scene in scenes] == ["whole.tif"]
    assert sum("1 of 2 images left out" in note and "link.tif" in note for note in region.inputs.notes) == 1
    assert make_run(wish).exit_code == 0
    link.unlink()
    shutil.copy(image, link)
    again = make_run(MapOptions(out=str(tmp_path / "run")), resume=True)
    assert again.exit_code == 0 and again.made.total() == 0
