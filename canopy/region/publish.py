"""What a finished region leaves for others: one raster over all tiles, and a STAC catalog of them.

    DIR/mosaic, mosaic.vrt      the tiles as one raster, written by GDAL; the second is the same, for programs
                                that go by the suffix
    DIR/index.gti.gpkg          the tiles' outlines: a layer for people, and GDAL's raster tile index (GTI)
    DIR/catalog.json            the catalog
    DIR/collection.json         the map: extent, dates, licence, links to all tiles
    DIR/tiles/ID.json           one item per tile (projection, raster, file and processing extensions)
    DIR/stac/GROUP.json         where there are many tiles: catalogs of up to a thousand of them each
    DIR/model.json              the model (MLM extension)

Tiles partition the region's grid, so there is neither gap nor overlap; tiles without imagery have no file and
read as nodata. Everything follows from the ledger's rows and the run file alone.
"""

from __future__ import annotations

import copy
import datetime
import shutil
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from canopy.errors import OutputError
from canopy.files import replacing, write_json
from canopy.inference import output
from canopy.region.ledger import Ledger, Outcome
from canopy.region.plan import Pins, Region, area_of, read_pins
from canopy.region.task import TILES, tile_path
from canopy.region.tiles import Tile

MOSAIC = "mosaic"
INDEX = "index.gti.gpkg"
# Up to here the VRT names the tiles themselves, which every GDAL reads; the index needs 3.9 or later.
VRT_MOST_TILES = 10_000
GROUP = 1000
_GDAL_TYPES = {"float32": "Float32", "uint16": "UInt16", "uint8": "Byte"}
_GEOJSON = "application/geo+json"
_MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
_WORLD = [[-180, -90], [180, -90], [180, 90], [-180, 90], [-180, -90]]
_COLOURS = ["red", "green", "blue"]


# ---- the mosaic -------------------------------------------------------------------------------
def write_mosaic(ledger: Ledger, region: Region, most_vrt: int = VRT_MOST_TILES) -> Path:
    """Write the index and DIR/mosaic; returns the latter's path.

    Raises:
        OutputError: one of them cannot be written.
    """
    import rasterio
    import rasterio.shutil

    from canopy.geo.cog import encoding_named

    folder, path = region.options.folder, region.options.folder / f"{MOSAIC}.vrt"
    tiles = [tile for tile, _ in ledger.rows("done")]
    _write_index(folder / INDEX, region, tiles)
    step_m = encoding_named(region.options.encoding).step_m
    with replacing(path) as part, rasterio.Env():
        try:
            rasterio.shutil.copy(folder / INDEX, part, driver="VRT")
            with rasterio.open(part, "r+", driver="VRT") as mosaic:
                mosaic.descriptions = [name for name, _ in region.bands]
                mosaic.units = [unit for _, unit in region.bands]
                mosaic.scales = [step_m if unit == "m" else 1.0 for _, unit in region.bands]
        except Exception as error:  # GDAL's own errors come through as classes of a private module
            raise OutputError(f"cannot be written ({error})", where=path) from error
        if len(tiles) <= most_vrt:
            _name_tiles(part, region, tiles)
    with replacing(folder / MOSAIC) as part:
        shutil.copyfile(path, part)
    return folder / MOSAIC


def _write_index(path: Path, region: Region, tiles: list[Tile]) -> None:
    """A GeoPackage of the tiles' outlines and files, with what GDAL's GTI driver must know beside them."""
    import geopandas
    import shapely

    from canopy.geo.cog import encoding_named

    area, count = region.tiling.area, len(region.bands)
    stored = encoding_named(region.options.encoding)
    facts = {
        "XSIZE": str(area.width), "YSIZE": str(area.height), "BAND_COUNT": str(count),
        "GEOTRANSFORM": ",".join(repr(float(value)) for value in area.transform.to_gdal()),
        "LOCATION_FIELD": "location",
        "DATA_TYPE": ",".join([_GDAL_TYPES[stored.dtype]] * count),
        "NODATA": ",".join([f"{stored.nodata:g}"] * count),
    }  # fmt: skip
    bounds = [region.tiling.window(tile.row, tile.col).bounds for tile in tiles]
    table = geopandas.GeoDataFrame(
        {"location": [f"{TILES}/{tile.id}.tif" for tile in tiles], "tile": [tile.id for tile in tiles]},
        geometry=[shapely.box(*box) for box in bounds], crs=area.crs.to_wkt(),
    ).astype({"location": "string", "tile": "string"})  # fmt: skip
    part = path.with_name(f".new-{path.name}")
    try:
        part.unlink(missing_ok=True)
        table.to_file(
            part, layer="tiles", driver="GPKG", engine="pyogrio", geometry_type="Polygon",
            layer_metadata=facts,
        )  # fmt: skip
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written ({error})", where=path) from error
    finally:
        part.unlink(missing_ok=True)


def _name_tiles(path: Path, region: Region, tiles: list[Tile]) -> None:
    """Let a VRT over the index name the tiles themselves instead."""
    tree = ElementTree.parse(path)
    for band in tree.iter("VRTRasterBand"):
        source = band.find("SimpleSource")
        if source is None:
            raise OutputError("GDAL wrote no source into it", where=path)
        band.remove(source)
        for tile in tiles:
            one = copy.deepcopy(source)
            top, left, height, width = region.tiling.offset(tile.row, tile.col)
            size = {"xSize": str(width), "ySize": str(height)}
            for tag, more in (("SrcRect", {"xOff": "0", "yOff": "0"}),
                              ("DstRect", {"xOff": str(left), "yOff": str(top)})):  # fmt: skip
                place = one.find(tag)
                assert place is not None
                place.attrib.update(more | size)
            name = one.find("SourceFilename")
            assert name is not None
            name.text, name.attrib["relativeToVRT"] = f"{TILES}/{tile.id}.tif", "1"
            band.append(one)
    tree.write(path)


# ---- the catalog ------------------------------------------------------------------------------
def write_catalog(ledger: Ledger, region: Region) -> Path:
    """Write all of it; returns the catalog's path.

    Raises:
        OutputError: a file cannot be written.
    """
    import pystac

    folder = region.options.folder
    pins = read_pins(folder) or region.pins
    catalog = pystac.Catalog(
        f"{_collection_id(region)}-catalog", "A canopy height map in tiles, and the model that made it.",
        title="Canopy height map", href=str(folder.resolve() / "catalog.json"),
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )  # fmt: skip
    collection, model = _collection(region, pins), pystac.Item.from_dict(model_item(region, pins))
    catalog.add_child(collection, title="the map")
    catalog.add_item(model, title="the model")
    # Only now: adding them gives them places after pystac's own custom.
    collection.set_self_href(str(folder.resolve() / "collection.json"))
    model.set_self_href(str(folder.resolve() / "model.json"))
    dates: set[str] = set()
    many = ledger.counts()["done"] > GROUP
    rows, number = ledger.rows("done"), 0
    while page := list(islice(rows, GROUP)):
        parent: pystac.Catalog = collection
        if many:
            (folder / "stac").mkdir(exist_ok=True)
            parent = pystac.Catalog(f"tiles-{number:05d}", f"{len(page)} tiles of the map.")
            collection.add_child(parent)
            parent.set_self_href(str(folder.resolve() / "stac" / f"{number:05d}.json"))
        for tile, outcome in page:
            dates.update(outcome.facts.get("dates", ()))
            item = pystac.Item.from_dict(tile_item(tile, outcome, region, pins))
            item.set_self_href(str(tile_path(folder.resolve(), tile.id).with_suffix(".json")))
            item.set_root(catalog)
            item.set_parent(parent)
            item.set_collection(collection)
            _write(item)
            # Only the item's place is kept: memory should not grow with what was said of each tile.
            parent.add_link(pystac.Link("item", item.get_self_href() or "", media_type=_GEOJSON))
        if many:
            _write(parent)
        number += 1
    if dates:
        first, last = min(dates), max(dates)
        collection.extent.temporal = pystac.TemporalExtent(
            [[_moment(f"{first}T00:00:00Z"), _moment(f"{last}T23:59:59Z")]]
        )
    for one in (model, collection, catalog):
        _write(one)
    return folder / "catalog.json"


def _write(thing: Any) -> None:
    write_json(Path(thing.get_self_href()), thing.to_dict(include_self_link=False))


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def tile_item(tile: Tile, outcome: Outcome, region: Region, pins: Pins) -> dict[str, Any]:
    """The item of one finished tile."""
    options, facts = region.options, outcome.facts
    item = output.map_item(
        output.MapFacts(
            path=tile_path(options.folder, tile.id),
            sha256=str(outcome.sha256),
            grid=region.tiling.window(tile.row, tile.col),
            encoding=options.encoding,
            bands=region.bands,
            dates=tuple(facts.get("dates", ())),
            imagery=tuple((name, name.replace(" ", "%20")) for name in facts.get("scenes", ())),
            model=_model_facts(region),
            statistics={
                "mean": facts["mean_m"],
                "maximum": facts["max_m"],
                "valid_percent": round(100 * facts["valid"] / facts["pixels"], 4),
            },
        ),
        created=_moment(pins["canopy"]["created"]),
    )
    item["links"].append(
        {"rel": "derived_from", "href": "../model.json", "type": _GEOJSON, "title": "the model"}
    )
    return item


def _collection(region: Region, pins: Pins) -> Any:
    import pystac

    # Unknown dates are the widest true statement, as in the items; `write_catalog` narrows it.
    unknown = pystac.TemporalExtent([[_moment("1900-01-01T00:00:00Z"), _moment(pins["canopy"]["created"])]])
    collection = pystac.Collection(
        _collection_id(region),
        f"Canopy height in metres of {pins['area']['text']}, predicted from "
        f"{output.imagery_text(region.source)} by the model {region.model_name}.",
        pystac.Extent(pystac.SpatialExtent([list(area_of(pins).bounds_lonlat)]), unknown),
        title="Canopy height map",
        keywords=["canopy height", "forest"],
        license="other",
        stac_extensions=[output.PROCESSING],
        summaries=pystac.Summaries(
            {
                "gsd": [round(region.tiling.area.gsd_m, 6)],
                "processing:software": {"canopy": pins["canopy"]["version"]},
            }
        ),
        extra_fields={
            "item_assets": {
                "canopy_height": {
                    **output.MAP_ASSET, "bands": output.band_facts(region.bands, region.options.encoding)
                },
            }
        },
    )  # fmt: skip
    collection.add_asset(
        "mosaic",
        pystac.Asset(
            f"./{MOSAIC}.vrt", "All tiles as one raster", media_type="application/xml", roles=["data"]
        ),
    )
    return collection


def model_item(region: Region, pins: Pins) -> dict[str, Any]:
    """The model as an item of the machine-learning model extension: what it takes, what it gives."""
    config, facts = region.model.config, _model_facts(region)
    side, dims = config.crop_px, ["batch", "channel", "height", "width"]
    crops = {"shape": [-1, 3, side, side], "dim_order": dims, "data_type": "float32"}
    heights = {"shape": [-1, 1, side, side], "dim_order": dims, "data_type": "float32"}
    return {
        "type": "Feature",
        "stac_version": output.STAC_VERSION,
        "stac_extensions": [_MLM, output.RASTER, output.FILE],
        "id": f"model-{facts['name']}",
        "geometry": {"type": "Polygon", "coordinates": [_WORLD]},
        "bbox": [-180, -90, 180, 90],
        "properties": {
            "datetime": pins["canopy"]["created"],
            "title": f"Canopy height model {facts['name']}",
            "mlm:name": facts["name"],
            "mlm:architecture": "ViT encoder, DPT decoder over height bins",
            "mlm:tasks": ["regression"],
            "mlm:framework": "pytorch",
            "mlm:total_parameters": int(sum(p.numel() for p in region.model.parameters())),
            "mlm:pretrained": True,
            "mlm:batch_size_suggestion": 4,
            "mlm:input": [
                {
                    "name": "RGB in 0..1", "bands": _COLOURS, "input": crops,
                    "resize_type": None, "pre_processing_function": None,
                }
            ],
            "mlm:output": [
                {
                    "name": "canopy height in metres", "tasks": ["regression"], "result": heights,
                    "post_processing_function": None,
                }
            ],
            "canopy:model_sha256": facts["sha256"],
            "canopy:backend": region.choice.backend,
            "canopy:precision": region.choice.precision,
            "canopy:gsd_m": config.gsd_m,
            "canopy:licence": facts["licence"],
        },
        "links": [],
        "assets": {
            "model": {
                "href": Path(region.options.model).name,
                "type": "application/octet-stream; application=safetensors",
                "title": f"Weights, sha256 {facts['sha256']}",
                "roles": ["mlm:model", "mlm:weights"],
                # MLM 1.4 wants STAC's own `bands` where STAC 1.1 forbids them; these it takes as well.
                "raster:bands": [{"name": name, "data_type": "float32"} for name in _COLOURS],
                **({"file:checksum": f"1220{facts['sha256']}"} if facts["sha256"] != "unsaved" else {}),
                "mlm:artifact_type": "safetensors",
            }
        },
    }  # fmt: skip


def _collection_id(region: Region) -> str:
    """A name that does not depend on where the folder lies."""
    return f"canopy-height-{output.bare_name(region.source.name).split('.')[0]}-{region.model_name}"


def _model_facts(region: Region) -> dict[str, str]:
    return {
        "name": region.model_name,
        "sha256": region.model.sha256 or "unsaved",
        "licence": str(region.model.card.get("licence", "")),
    }
