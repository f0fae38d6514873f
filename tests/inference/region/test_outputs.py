"""What a finished region leaves for others: valid files, a valid catalog, and words on where it came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import rasterio
from rio_cogeo import cog_validate

from canopy.geo.raster import read_raster
from canopy.inference.job import prepare
from canopy.inference.region.run import prepare_run, start
from canopy.inference.region.settings import RegionSettings
from canopy.inference.request import Request


def test_outputs_are_valid_and_say_where_they_come_from(
    settings: Callable[..., RegionSettings], inline: type, tmp_path: Path
) -> None:
    result = start(prepare_run(settings(encoding="uint16cm", date_band=True)), engine=inline)
    folder = tmp_path / "run"
    collection = json.loads((folder / "collection.json").read_text())
    items = [link["href"] for link in collection["links"] if link["rel"] == "item"]
    assert len(items) == result.counts["done"] > 1
    assert collection["extent"]["temporal"]["interval"] == [["2021-06-15T00:00:00Z", "2021-06-15T23:59:59Z"]]
    for href in items:
        item = json.loads((folder / href).read_text())
        path = folder / "tiles" / item["assets"]["canopy_height"]["href"]
        valid, errors, warnings = cog_validate(path, strict=True)
        assert valid and not errors and not warnings
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert item["assets"]["canopy_height"]["file:checksum"] == f"1220{digest}"
        assert item["properties"]["datetime"] == "2021-06-15T00:00:00Z"
        assert (
            item["properties"]["created"]
            == json.loads((folder / "run.json").read_text())["canopy"]["created"]
        )
        with rasterio.open(path) as dataset:
            assert dataset.tags()["CANOPY_IMAGERY"] == "texture.tif"
            assert list(dataset.transform)[:6] == item["properties"]["proj:transform"]
            dataset.read()
    check_stac(folder)
    model = json.loads((folder / "model.json").read_text())["properties"]
    assert model["mlm:name"] == "small-random" and model["mlm:total_parameters"] > 1000
    with rasterio.open(folder / "mosaic") as mosaic:
        assert mosaic.scales == (0.01, 1.0) and mosaic.nodata == 65535
    assert read_raster(folder / "mosaic.vrt").valid.any()  # canopy's own reader takes it


def check_stac(folder: Path) -> None:
    """pystac reads all of it, follows every link, and the extensions' own classes find their fields."""
    import pystac
    from pystac.extensions.file import FileExtension
    from pystac.extensions.projection import ProjectionExtension
    from pystac.extensions.raster import RasterExtension

    catalog = pystac.Catalog.from_file(str(folder / "catalog.json"))
    (collection,) = catalog.get_children()
    assert isinstance(collection, pystac.Collection)
    for item in collection.get_items():
        assert item.get_root() is catalog and item.collection_id == collection.id
        assert (
            ProjectionExtension.ext(item).shape and FileExtension.ext(item.assets["canopy_height"]).checksum
        )
        assert RasterExtension.ext(item.assets["canopy_height"]).bands
    assert [item.id for item in catalog.get_items()] == ["model-small-random"]


def schemas() -> dict[str, str]:
    """Addresses to files: STAC's own schemas, which pystac has; extensions' where CANOPY_STAC_SCHEMAS is.

    benchmarks/region_outputs.py fills such a folder.
    """
    import pystac

    core = Path(pystac.__file__).parent / "validation" / "jsonschemas"
    found = {f"https://geojson.org/schema/{p.name}": str(p) for p in (core / "geojson").glob("*.json")}
    for path in (core / "stac-spec" / "v1.1.0").glob("*.json"):
        kind = path.stem if path.stem in ("catalog", "collection") else "item"
        found[f"https://schemas.stacspec.org/v1.1.0/{kind}-spec/json-schema/{path.name}"] = str(path)
    if "CANOPY_STAC_SCHEMAS" in os.environ:
        for path in Path(os.environ["CANOPY_STAC_SCHEMAS"]).glob("stac-extensions.github.io_*"):
            host, name, version, last = path.name.split("_")
            found[f"https://{host}/{name}/{version}/{last}"] = str(path)
    return found


def test_stac_validator_takes_every_file(
    settings: Callable[..., RegionSettings], inline: type, image: Path, small_model: Path, tmp_path: Path
) -> None:
    from stac_validator import stac_validator as validator

    start(prepare_run(settings(encoding="uint8m", zoom=18, tile_px=256)), engine=inline)
    request = Request(images=(str(image),), model=str(small_model), out=tmp_path / "one.tif", quicklook=True)
    prepare(request).run()
    known = schemas()
    folder = tmp_path / "run"
    names = ("catalog.json", "collection.json", "model.json")
    files = [*(folder / name for name in names), *folder.glob("tiles/*.json"), tmp_path / "one.json"]
    assert len(files) > 4
    for path in files:
        check = validator.StacValidate(
            str(path), schema_map=known, core="CANOPY_STAC_SCHEMAS" not in os.environ
        )
        check.run()
        assert all(message["valid_stac"] for message in check.message), (path.name, check.message)
