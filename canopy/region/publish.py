"""What a finished region leaves for others: one raster over all tiles, and a STAC catalog of them.

    DIR/mosaic, mosaic.vrt      the tiles as one raster, a GDAL VRT; the second is the same, for programs
                                that go by the suffix
    DIR/catalog.json            the catalog
    DIR/collection.json         the map: extent, dates, licence, links to all tiles
    DIR/tiles/ID.json           one item per tile (projection, raster, file and processing extensions)

Tiles partition the region's grid, so there is neither gap nor overlap; tiles without imagery have no file and
read as nodata. Everything follows from the ledger's rows and the run file alone.
"""

from __future__ import annotations

import datetime
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement

from canopy.files import replacing, write_json
from canopy.geo.cog import encoding_named
from canopy.inference import output
from canopy.region.ledger import Ledger, Pins, read_pins
from canopy.region.plan import Region, area_of
from canopy.region.tiles import TILES, Tile, tile_path

MOSAIC = "mosaic"
_GDAL_TYPES = {"float32": "Float32", "uint16": "UInt16", "uint8": "Byte"}


# ---- the mosaic -------------------------------------------------------------------------------
def write_mosaic(ledger: Ledger, region: Region) -> Path:
    """Write DIR/mosaic and DIR/mosaic.vrt; returns the former's path.

    Raises:
        OutputError: one of them cannot be written.
    """
    folder, area, stored = (
        region.options.folder, region.tiling.area, encoding_named(region.options.encoding)
    )  # fmt: skip
    tiles = [tile for tile, _ in ledger.rows("done")]
    vrt = Element("VRTDataset", rasterXSize=str(area.width), rasterYSize=str(area.height))
    SubElement(vrt, "SRS").text = area.crs.to_wkt()
    SubElement(vrt, "GeoTransform").text = ", ".join(repr(float(v)) for v in area.transform.to_gdal())
    for number, (name, unit) in enumerate(region.inputs.extras.bands, 1):
        kind = _GDAL_TYPES[stored.dtype]
        band = SubElement(vrt, "VRTRasterBand", dataType=kind, band=str(number))
        SubElement(band, "Description").text = name
        SubElement(band, "NoDataValue").text = f"{stored.nodata:g}"
        SubElement(band, "UnitType").text = unit
        SubElement(band, "Scale").text = str(stored.step_m if unit == "m" else 1.0)
        for tile in tiles:
            _add_tile(band, number, kind, tile, region)
    with replacing(folder / f"{MOSAIC}.vrt") as part:
        ElementTree(vrt).write(part)
    with replacing(folder / MOSAIC) as part:
        shutil.copyfile(folder / f"{MOSAIC}.vrt", part)
    return folder / MOSAIC


def _add_tile(band: Element, number: int, kind: str, tile: Tile, region: Region) -> None:
    """Let a band of the mosaic show a tile's band."""
    top, left, height, width = region.tiling.offset(tile.row, tile.col)
    source = SubElement(band, "SimpleSource")
    SubElement(source, "SourceFilename", relativeToVRT="1").text = f"{TILES}/{tile.id}.tif"
    SubElement(source, "SourceBand").text = str(number)
    # With these GDAL need not open every tile to open the mosaic.
    SubElement(source, "SourceProperties", RasterXSize=str(width), RasterYSize=str(height), DataType=kind)
    for tag, x, y in (("SrcRect", 0, 0), ("DstRect", left, top)):
        SubElement(source, tag, xOff=str(x), yOff=str(y), xSize=str(width), ySize=str(height))


# ---- the catalog ------------------------------------------------------------------------------
def write_catalog(ledger: Ledger, region: Region) -> dict[str, float]:
    """Write all of it; returns the findings of the whole map, from those of its tiles.

    Raises:
        OutputError: a file cannot be written.
    """
    import pystac

    folder = region.options.folder.resolve()
    pins = read_pins(folder) or region.pins
    # A name that does not depend on where the folder lies.
    made = region.inputs
    name = f"canopy-height-{output.bare_name(made.source.name).split('.')[0]}-{made.model_name}"
    catalog = pystac.Catalog(
        f"{name}-catalog", "A canopy height map in tiles.", title="Canopy height map",
        href=str(folder / "catalog.json"), catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )  # fmt: skip
    collection = _collection(name, region, pins)
    catalog.add_child(collection, title="the map")
    # Only now: adding it gives it a place after pystac's own custom.
    collection.set_self_href(str(folder / "collection.json"))
    days: list[datetime.datetime] = []
    weight, found = 0.0, Counter[str]()
    for tile, _ in ledger.rows("done"):
        path = tile_path(folder, tile.id).with_suffix(".json")
        item = pystac.Item.from_file(str(path))
        dates = item.datetime, item.common_metadata.start_datetime, item.common_metadata.end_datetime
        if dates[1] is None or dates[1] > output.UNKNOWN:
            days += [day for day in dates if day is not None]
        km2 = tile.km2 * item.assets["canopy_height"].extra_fields["bands"][0].get("statistics", {}).get(
            "valid_percent", 0.0
        )
        weight += km2
        found.update({name: km2 * share for name, share in item.properties["canopy:findings"].items()})
        if item.get_single_link("collection") is None:
            item.set_root(catalog)
            item.set_parent(collection)
            item.set_collection(collection)
            # The run's: a tile that is made again is the same.
            item.properties["created"] = pins["canopy"]["created"]
            _write(item)
        # Only the item's place is kept: memory should not grow with what was said of each tile.
        collection.add_link(pystac.Link("item", str(path), media_type="application/geo+json"))
        days = [min(days), max(days)] if days else []
    if days:
        # An item of one day names its beginning.
        end = days[-1].replace(hour=23, minute=59, second=59)
        collection.extent.temporal = pystac.TemporalExtent([[days[0], end]])
    findings = {name: round(total / weight, 4) for name, total in found.items()} if weight else {}
    collection.extra_fields["canopy:findings"] = findings
    _write(collection)
    _write(catalog)
    return findings


def _write(thing: Any) -> None:
    write_json(Path(thing.get_self_href()), thing.to_dict(include_self_link=False))


def _collection(name: str, region: Region, pins: Pins) -> Any:
    import pystac

    # Unknown dates are the widest true statement, as in the items; `write_catalog` narrows it.
    made, created = region.inputs, datetime.datetime.fromisoformat(pins["canopy"]["created"])
    unknown = pystac.TemporalExtent([[output.UNKNOWN, created]])
    height = {
        **output.MAP_ASSET,
        "bands": output.band_facts(made.extras.bands, region.options.encoding),
    }
    terms = output.terms_facts(made.source.terms)
    collection = pystac.Collection(
        name,
        f"Canopy height in metres of {pins['area']['text']}, predicted from "
        f"{output.imagery_text(output.Scenes.of(made.source))} by the model {made.model_name}.",
        pystac.Extent(pystac.SpatialExtent([list(area_of(pins).bounds_lonlat)]), unknown),
        title="Canopy height map",
        keywords=["canopy height", "forest"],
        license=terms.get("license", "other"),
        providers=[pystac.Provider.from_dict(one) for one in terms.get("providers", ())],
        stac_extensions=[output.PROCESSING],
        summaries=pystac.Summaries(
            {
                "gsd": [round(region.tiling.area.gsd_m, 6)],
                "processing:software": {"canopy": pins["canopy"]["version"]},
            }
        ),
        extra_fields={"item_assets": {"canopy_height": height}},
    )
    mosaic = pystac.Asset(
        f"./{MOSAIC}.vrt", "All tiles as one raster", media_type="application/xml", roles=["data"]
    )
    collection.add_asset("mosaic", mosaic)
    return collection
