"""What a finished region leaves for others: valid files, a valid catalog, and words on where it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pystac
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import RasterExtension
from rio_cogeo import cog_validate

from canopy.files import file_sha256
from canopy.geo.reading import read_raster
from canopy.inference.options import OneMapOptions
from canopy.inference.predict import prepare
from canopy.region.options import MapOptions


def test_outputs_are_valid_and_say_where_they_come_from(
    options: Callable[..., MapOptions], make_run: Callable, tmp_path: Path
) -> None:
    result = make_run(options(encoding="uint16cm", date_band=True))
    folder = tmp_path / "run"
    catalog = pystac.Catalog.from_file(str(folder / "catalog.json"))
    (collection,) = catalog.get_children()
    assert isinstance(collection, pystac.Collection)
    days = [[moment.isoformat() for moment in span] for span in collection.extent.temporal.intervals]
    assert days == [["2021-06-15T00:00:00+00:00", "2021-06-15T23:59:59+00:00"]]
    items = list(collection.get_items())
    assert len(items) == result.counts["done"] > 1
    created = json.loads((folder / "run.json").read_text())["canopy"]["created"]
    for item in items:
        assert item.get_root() is catalog and item.collection_id == collection.id
        asset = item.assets["canopy_height"]
        path = folder / "tiles" / asset.href
        valid, errors, warnings = cog_validate(path, strict=True)
        assert valid and not errors and not warnings
        assert FileExtension.ext(asset).checksum == f"1220{file_sha256(path)}"
        assert len(RasterExtension.ext(asset).bands or ()) == 2
        assert item.properties["created"] == created
        assert item.properties["canopy:model"]["name"] == "small-random"
        with rasterio.open(path) as dataset:
            assert dataset.tags()["CANOPY_IMAGERY"] == "texture.tif"
            assert list(dataset.transform)[:6] == ProjectionExtension.ext(item).transform
    with rasterio.open(folder / "mosaic") as mosaic:
        assert mosaic.scales == (0.01, 1.0) and mosaic.nodata == 65535
        assert mosaic.descriptions == ("canopy_height", "acquisition_date")
    assert read_raster(folder / "mosaic.vrt").valid.any()  # canopy's own reader takes it


def test_gdal_places_a_mosaic_of_northings_where_its_tiles_are(
    options: Callable[..., MapOptions], make_run: Callable, image: Path, tmp_path: Path
) -> None:
    new_zealand = tmp_path / "nz.tif"
    with rasterio.open(image) as dataset:
        profile = dataset.profile | {"crs": "EPSG:2193", "transform": Affine(0.5, 0, 1.5e6, 0, -0.5, 5.4e6)}
        with rasterio.open(new_zealand, "w", **profile) as copy:
            copy.write(dataset.read())
    result = make_run(options(images=(str(new_zealand),), crs="EPSG:2193", tile_px=256))
    assert result.counts["done"] >= 1

    def placed(path: Path) -> tuple[float, ...]:
        """Bounds in EPSG:3857 of what GDAL itself, which heeds the order of axes, warps there."""
        out = tmp_path / "placed.tif"
        rasterio.shutil.copy(path, out, driver="COG", TILING_SCHEME="GoogleMapsCompatible", OVERWRITE="YES")
        with rasterio.open(out) as dataset:
            return tuple(dataset.bounds)

    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic:
        rasterio.shutil.copy(mosaic, tmp_path / "plain.tif", driver="GTiff", dtype="float32")
    found = placed(tmp_path / "run" / "mosaic.vrt")
    assert found == pytest.approx(placed(tmp_path / "plain.tif"))
    assert found[0] / 111_319.49 == pytest.approx(171.8, abs=0.01)  # degrees east, not west of America


def schemas() -> dict[str, str]:
    """Addresses to files: STAC's own schemas, which pystac has; extensions' where CANOPY_STAC_SCHEMAS is.

    A file there has its address as its name, `_` for `/`: stac-extensions.github.io_NAME_VERSION_schema.json.
    """
    core = Path(pystac.__file__).parent / "validation" / "jsonschemas"
    found = {f"https://geojson.org/schema/{p.name}": str(p) for p in (core / "geojson").glob("*.json")}
    for path in (core / "stac-spec" / "v1.1.0").glob("*.json"):
        kind = path.stem if path.stem in ("catalog", "collection") else "item"
        found[f"https://schemas.stacspec.org/v1.1.0/{kind}-spec/json-schema/{path.name}"] = str(path)
    if "CANOPY_STAC_SCHEMAS" in os.environ:
        for path in Path(os.environ["CANOPY_STAC_SCHEMAS"]).glob("stac-extensions.github.io_*"):
            found[f"https://{path.name.replace('_', '/')}"] = str(path)
    return found


def test_stac_validator_takes_every_file(
    options: Callable[..., MapOptions], make_run: Callable, image: Path, small_model: Path, tmp_path: Path
) -> None:
    from stac_validator import stac_validator as validator

    make_run(options(encoding="uint8m", zoom=18, tile_px=256))
    options = OneMapOptions(
        images=(str(image),), model=str(small_model), out=str(tmp_path / "one.tif"), quicklook=True
    )
    prepare(options).run()
    known = schemas()
    folder = tmp_path / "run"
    files = [folder / "catalog.json", folder / "collection.json", *folder.glob("tiles/*.json")]
    assert len(files) > 2
    for path in [*files, tmp_path / "one.json"]:
        check = validator.StacValidate(
            str(path), schema_map=known, core="CANOPY_STAC_SCHEMAS" not in os.environ
        )
        check.run()
        assert all(message["valid_stac"] for message in check.message), (path.name, check.message)
