"""The tiles as one raster: DIR/mosaic, an index that GDAL and QGIS open, with overviews of the whole region.

It is a VRT, which every GDAL reads: over the tiles themselves, or, when they are many thousands, over a
spatial index of them (GTI, GDAL 3.9 or later), so that opening stays quick. DIR/mosaic.vrt is the same, for
programs that go by the suffix. Tiles partition the region's grid, so there is neither gap nor overlap; tiles
without imagery have no file and read as nodata.

The STAC catalog of a region: what was mapped, where, when, from what, by which model; every file's hash.

    DIR/catalog.json            the catalog
    DIR/collection.json         the map: extent, dates, licence, links to all tiles
    DIR/tiles/ID.json           one item per tile (projection, raster, file and processing extensions)
    DIR/stac/GROUP.json         where there are many tiles: catalogs of up to a thousand of them each
    DIR/model.json              the model (MLM extension)

Plain STAC 1.1.0 JSON from the ledger's rows and the run's pins alone, so the same run gives the same catalog.

`--layout published`: the map again, in tiles named and stored as the published canopy-height maps are.

    v1: zoom 9,  65,536 px: chm/QUADKEY.tif, msk/QUADKEY.tif.msk (255 = masked), metadata/QUADKEY.geojson
    v2: zoom 10, 32,768 px: chm/QUADKEY.tif, metadata/QUADKEY.tif (year of the imagery - 2000)

Both: EPSG:3857 at 1.194 m, uint8 whole metres, and tiles.geojson. Unlike the published ones, our tiles also
say in the file itself what is not mapped (nodata 255): bare ground and no data cannot be confused.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from odc.geo.crs import CRS
from rasterio.windows import Window

from canopy.errors import ConfigError, OutputError
from canopy.files import replacing
from canopy.geo.grid import Grid
from canopy.geo.raster import BandSpec, CogWriter, raster_env
from canopy.geo.tiles import HALF_WORLD_M, quadkey_grid, quadkeys
from canopy.inference import output
from canopy.inference.layers import band_specs
from canopy.inference.output import (
    COG_TYPE,
    FILE,
    MAP_ASSET,
    PROCESSING,
    RASTER,
    STAC_VERSION,
    MapFacts,
    band_facts,
    map_item,
    write_json,
)
from canopy.region.ledger import Ledger, Row
from canopy.region.plan import Pins, Prepared, area_of
from canopy.region.task import TILES, tile_path
from canopy.region.tiles import TileTask, Tiling

MOSAIC = "mosaic"
OVERVIEW = "overview.tif"
INDEX = "index.gti.gpkg"
VRT_MOST_TILES = 10_000
# The overview file starts where it is at most this wide; finer levels are in the tiles themselves.
OVERVIEW_PX = 8192
OVERVIEW_FROM = 8
_STRIP = 512
_GDAL_TYPES = {"float32": "Float32", "uint16": "UInt16", "uint8": "Byte"}


def write_mosaic(ledger: Ledger, prepared: Prepared, folder: Path, most_vrt: int = VRT_MOST_TILES) -> Path:
    """Write DIR/mosaic with its overviews; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    tiling, bands, encoding = prepared.tiling, prepared.bands, prepared.settings.encoding
    count = ledger.counts()["done"]
    for name in (INDEX, OVERVIEW):
        (folder / name).unlink(missing_ok=True)
    indexed = count > most_vrt
    tiles = [] if indexed else [row.task for row in ledger.rows("done")]
    path = folder / f"{MOSAIC}.vrt"

    def write(overview: bool) -> None:
        if indexed:
            lines = _over_index(tiling, encoding, bands, overview)
        else:
            lines = _over_tiles(tiling, tiles, encoding, bands, overview)
        _write_text(path, lines)

    if indexed:
        facts = _index_facts(tiling, encoding, len(bands))
        _write_index(folder / INDEX, tiling, (row.task for row in ledger.rows("done")), facts)
    write(overview=False)
    if count and write_overview(path, folder / OVERVIEW, tiling.area, encoding, bands):
        write(overview=True)
    _write_text(folder / MOSAIC, iter([path.read_text(encoding="utf-8")]))
    return folder / MOSAIC


def overview_factor(area: Grid) -> int:
    """How many pixels of the map make one of the overview file: a power of two."""
    factor = OVERVIEW_FROM
    while max(area.shape) / factor > OVERVIEW_PX:
        factor *= 2
    return factor


def write_overview(
    mosaic: Path, path: Path, area: Grid, encoding: str, bands: tuple[tuple[str, str], ...]
) -> bool:
    """The whole region at a coarse pixel, as a COG (which has the coarser levels inside).

    Read through the tiles' own overviews, so that it costs a glance at every tile. False where the region is
    too small to need one.
    """
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    from canopy.geo.raster import CogWriter, raster_env

    factor = overview_factor(area)
    height, width = -(-area.height // factor), -(-area.width // factor)
    if max(height, width) < 64:
        return False
    px, py = area.pixel
    west, north = area.xy(0, 0)
    grid = Grid.of(area.crs, (px * factor, 0, west, 0, -py * factor, north), (height, width))
    writer = CogWriter(path, grid, band_specs(bands), encoding=encoding, overwrite=True)
    with raster_env(), rasterio.open(mosaic) as dataset, writer:
        scales = np.array(dataset.scales, np.float32)[:, None, None]
        for row in range(0, height, _STRIP):
            for col in range(0, width, _STRIP):
                h, w = min(_STRIP, height - row), min(_STRIP, width - col)
                fine_h = min(h * factor, area.height - row * factor)
                fine_w = min(w * factor, area.width - col * factor)
                window = Window(col * factor, row * factor, fine_w, fine_h)
                # Heights are averaged; days and flags are taken as they are somewhere.
                parts = [
                    dataset.read(
                        number, window=window, out_shape=(h, w), masked=True,
                        resampling=Resampling.average if unit == "m" else Resampling.nearest,
                    )
                    for number, (_, unit) in enumerate(bands, 1)
                ]  # fmt: skip
                values = np.stack([np.ma.filled(p.astype(np.float32), np.nan) for p in parts]) * scales
                writer.write(values, np.logical_and.reduce(np.isfinite(values)), row, col)
    return True


def _stored(encoding: str) -> tuple[str, str, float]:
    """GDAL's type, nodata text and scale of an encoding."""
    from canopy.geo.encoding import encoding_named

    found = encoding_named(encoding)
    nodata = "nan" if np.isnan(found.nodata) else f"{found.nodata:g}"
    return _GDAL_TYPES[found.dtype], nodata, found.step_m


def _over_tiles(
    tiling: Tiling, tiles: list[TileTask], encoding: str, bands: tuple[tuple[str, str], ...], overview: bool
) -> Iterator[str]:
    """Lines of a VRT over the tiles themselves."""
    dtype = _stored(encoding)[0]

    def sources(number: int) -> Iterator[str]:
        for task in tiles:
            top, left, height, width = tiling.offset(task.row, task.col)
            size = f'xSize="{width}" ySize="{height}"'
            yield (
                f'    <SimpleSource><SourceFilename relativeToVRT="1">{TILES}/{escape(task.id)}.tif'
                f"</SourceFilename><SourceBand>{number}</SourceBand>"
                f'<SourceProperties RasterXSize="{width}" RasterYSize="{height}" DataType="{dtype}" '
                f'BlockXSize="512" BlockYSize="512"/>'
                f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="{left}" yOff="{top}" {size}/>'
                "</SimpleSource>"
            )

    return _vrt(tiling, sources, encoding, bands, overview)


def _vrt(
    tiling: Tiling,
    sources: Callable[[int], Iterator[str]],
    encoding: str,
    bands: tuple[tuple[str, str], ...],
    overview: bool,
) -> Iterator[str]:
    """Lines of a VRT of the region's grid; `sources` gives those of a band, by its number."""
    area = tiling.area
    yield f'<VRTDataset rasterXSize="{area.width}" rasterYSize="{area.height}">'
    yield f'  <SRS dataAxisToSRSAxisMapping="{axis_mapping(area.crs)}">{escape(area.crs.to_wkt())}</SRS>'
    west, north = area.xy(0, 0)
    px, py = area.pixel
    yield f"  <GeoTransform>{west!r}, {px!r}, 0.0, {north!r}, 0.0, {-py!r}</GeoTransform>"
    yield '  <Metadata><MDI key="AREA_OR_POINT">Area</MDI></Metadata>'
    dtype, nodata, scale = _stored(encoding)
    for number, (name, unit) in enumerate(bands, 1):
        yield f'  <VRTRasterBand dataType="{dtype}" band="{number}" blockXSize="512" blockYSize="512">'
        yield f"    <Description>{name}</Description><UnitType>{unit}</UnitType>"
        yield f"    <NoDataValue>{nodata}</NoDataValue>"
        if unit == "m" and scale != 1:
            yield f"    <Offset>0</Offset><Scale>{scale!r}</Scale>"
        yield from sources(number)
        if overview:
            yield (
                f'    <Overview><SourceFilename relativeToVRT="1">{OVERVIEW}</SourceFilename>'
                f"<SourceBand>{number}</SourceBand></Overview>"
            )
        yield "  </VRTRasterBand>"
    yield "</VRTDataset>"


def axis_mapping(crs: CRS) -> str:
    """Which axes of a CRS a raster's x and y are, in GDAL's words: `2,1` where northings come first.

    GDAL's own rule (OGRSpatialReference, traditional GIS order). Readers that heed it, as GDAL's tools and
    QGIS do, would place a mosaic in EPSG:2193 on another continent without it.
    """
    axes = crs.proj.axis_info[:2]
    directions, names = [axis.direction for axis in axes], [axis.name.lower() for axis in axes]
    # Around a pole both axes point the same way, and only their names tell them apart.
    polar = directions in (["north"] * 2, ["south"] * 2)
    swapped = names[0].startswith("northing") if polar else directions == ["north", "east"]
    return "2,1" if swapped else "1,2"


def _over_index(
    tiling: Tiling, encoding: str, bands: tuple[tuple[str, str], ...], overview: bool
) -> Iterator[str]:
    """Lines of a VRT whose only source is the index of the tiles, which GDAL's GTI driver reads."""
    area = tiling.area
    size = f'xSize="{area.width}" ySize="{area.height}"'
    dtype = _stored(encoding)[0]

    def source(number: int) -> Iterator[str]:
        yield (
            f'    <SimpleSource><SourceFilename relativeToVRT="1">{INDEX}</SourceFilename>'
            f'<SourceBand>{number}</SourceBand><SourceProperties RasterXSize="{area.width}" '
            f'RasterYSize="{area.height}" DataType="{dtype}" BlockXSize="512" BlockYSize="512"/>'
            f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="0" yOff="0" {size}/></SimpleSource>'
        )

    return _vrt(tiling, source, encoding, bands, overview)


def _index_facts(tiling: Tiling, encoding: str, count: int) -> dict[str, str]:
    """What the GTI driver must know beside the tiles' outlines."""
    west, south, east, north = tiling.area.bounds
    px, py = tiling.area.pixel
    dtype, nodata, _ = _stored(encoding)
    return {
        "RESX": repr(px), "RESY": repr(py), "MINX": repr(west), "MINY": repr(south), "MAXX": repr(east),
        "MAXY": repr(north), "BAND_COUNT": str(count), "DATA_TYPE": ",".join([dtype] * count),
        "NODATA": ",".join([nodata] * count), "LOCATION_FIELD": "location",
    }  # fmt: skip


def _write_index(path: Path, tiling: Tiling, tasks: Iterator[TileTask], facts: dict[str, str]) -> None:
    """A GeoPackage of the tiles' outlines and places, a thousand rows at a time."""
    import geopandas
    import shapely

    page: list[TileTask] = []

    def flush() -> None:
        if not page:
            return
        boxes = [shapely.box(*tiling.window(task.row, task.col).bounds) for task in page]
        table = {"location": [f"{TILES}/{task.id}.tif" for task in page], "tile": [task.id for task in page]}
        frame = geopandas.GeoDataFrame(table, geometry=boxes, crs=tiling.area.crs.to_wkt())
        extra = {"mode": "a"} if path.exists() else {"layer_metadata": facts}
        frame.to_file(path, layer="tiles", driver="GPKG", engine="pyogrio", **extra)
        page.clear()

    try:
        for task in tasks:
            page.append(task)
            if len(page) == 20_000:
                flush()
        flush()
    except OSError as error:
        raise OutputError(f"cannot be written ({error})", where=path) from error


def _write_text(path: Path, lines: Iterator[str]) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line if line.endswith("\n") else f"{line}\n")


GROUP = 1000
_WORLD = [[-180, -90], [180, -90], [180, 90], [-180, 90], [-180, -90]]
_COLOURS = ["red", "green", "blue"]
_DIMS = ["batch", "channel", "height", "width"]
MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
_JSON, _GEOJSON = "application/json", "application/geo+json"


def write_catalog(ledger: Ledger, prepared: Prepared, pins: Pins) -> Path:
    """Write all of it; returns the catalog's path.

    Raises:
        OutputError: a file cannot be written.
    """
    folder = prepared.settings.folder
    count = ledger.counts()["done"]
    dates: set[str] = set()
    groups: list[str] = []
    if count > GROUP:
        (folder / "stac").mkdir(exist_ok=True)
    links: list[dict[str, str]] = []
    for number, page in enumerate(_pages(ledger)):
        page_links = []
        for row in page:
            item = tile_item(row, prepared, pins)
            dates.update(row.facts.get("dates", ()))
            write_json(tile_path(folder, row.task.id).with_suffix(".json"), item)
            page_links.append(_link("item", f"tiles/{row.task.id}.json", _GEOJSON))
        if count <= GROUP:
            links += page_links
            continue
        name = f"stac/{number:05d}.json"
        write_json(folder / name, _group(number, page_links))
        groups.append(name)
    links += [_link("child", name, _JSON) for name in groups]
    write_json(folder / "model.json", model_item(prepared, pins))
    write_json(folder / "collection.json", _collection(prepared, pins, sorted(dates), links))
    write_json(folder / "catalog.json", _catalog(prepared))
    return folder / "catalog.json"


def _pages(ledger: Ledger) -> Iterator[list[Row]]:
    page: list[Row] = []
    for row in ledger.rows("done"):
        page.append(row)
        if len(page) == GROUP:
            yield page
            page = []
    if page:
        yield page


def tile_item(row: Row, prepared: Prepared, pins: Pins) -> dict[str, Any]:
    """The item of one finished tile."""
    settings, facts = prepared.settings, row.facts
    item = map_item(
        MapFacts(
            path=tile_path(settings.folder, row.task.id),
            sha256=str(row.sha256),
            grid=prepared.tiling.window(row.task.row, row.task.col),
            encoding=settings.encoding,
            bands=prepared.bands,
            dates=tuple(facts.get("dates", ())),
            imagery=tuple((name, name.replace(" ", "%20")) for name in facts.get("scenes", ())),
            model=_model_facts(prepared),
            statistics={
                "mean": facts["mean_m"],
                "maximum": facts["max_m"],
                "valid_percent": round(100 * facts["valid"] / facts["pixels"], 4),
            },
        ),
        created=datetime.datetime.fromisoformat(pins["canopy"]["created"]),
    )
    item["collection"] = _collection_id(prepared)
    item["links"] += [
        _link("root", "../catalog.json", _JSON),
        _link("parent", "../collection.json", _JSON),
        _link("collection", "../collection.json", _JSON),
        _link("derived_from", "../model.json", _GEOJSON, "the model"),
    ]
    return item


def model_item(prepared: Prepared, pins: Pins) -> dict[str, Any]:
    """The model as an item of the machine-learning model extension: what it takes, what it gives."""
    config, facts = prepared.model.config, _model_facts(prepared)
    created = pins["canopy"]["created"]
    side = config.crop_px
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [MLM, RASTER, FILE],
        "id": f"model-{facts['name']}",
        "geometry": {"type": "Polygon", "coordinates": [_WORLD]},
        "bbox": [-180, -90, 180, 90],
        "properties": {
            "datetime": created,
            "title": f"Canopy height model {facts['name']}",
            "mlm:name": facts["name"],
            "mlm:architecture": "ViT encoder, DPT decoder over height bins",
            "mlm:tasks": ["regression"],
            "mlm:framework": "pytorch",
            "mlm:total_parameters": int(sum(p.numel() for p in prepared.model.parameters())),
            "mlm:pretrained": True,
            "mlm:batch_size_suggestion": 4,
            "mlm:input": [
                {
                    "name": "RGB in 0..1",
                    "bands": _COLOURS,
                    "input": {"shape": [-1, 3, side, side], "dim_order": _DIMS, "data_type": "float32"},
                    "resize_type": None,
                    "pre_processing_function": None,
                }
            ],
            "mlm:output": [
                {
                    "name": "canopy height in metres",
                    "tasks": ["regression"],
                    "result": {"shape": [-1, 1, side, side], "dim_order": _DIMS, "data_type": "float32"},
                    "post_processing_function": None,
                }
            ],
            "canopy:model_sha256": facts["sha256"],
            "canopy:backend": prepared.choice.backend,
            "canopy:precision": prepared.choice.precision,
            "canopy:gsd_m": config.gsd_m,
            "canopy:licence": facts["licence"],
        },
        "links": [
            _link("root", "./catalog.json", _JSON),
            _link("parent", "./catalog.json", _JSON),
        ],
        "assets": {
            "model": {
                "href": Path(prepared.settings.model).name,
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


def _collection(
    prepared: Prepared, pins: Pins, dates: list[str], links: list[dict[str, str]]
) -> dict[str, Any]:
    settings = prepared.settings
    west, south, east, north = area_of(pins).bounds_lonlat
    # Unknown dates become the widest true statement, as in the items.
    interval = ["1900-01-01T00:00:00Z", pins["canopy"]["created"]]
    if dates:
        interval = [f"{dates[0]}T00:00:00Z", f"{dates[-1]}T23:59:59Z"]
    assets = {
        "mosaic": {
            "href": f"./{MOSAIC}.vrt", "type": "application/xml", "title": "All tiles as one raster",
            "roles": ["data"],
        },
    }  # fmt: skip
    if (settings.folder / OVERVIEW).exists():
        assets["overview"] = {
            "href": f"./{OVERVIEW}", "type": COG_TYPE, "title": "The region at a coarse pixel",
            "roles": ["overview"],
        }  # fmt: skip
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [PROCESSING],
        "id": _collection_id(prepared),
        "title": "Canopy height map",
        "description": (
            f"Canopy height in metres of {pins['area']['text']}, predicted from "
            f"{output.imagery_text(prepared.source)} by the model {prepared.model_name}."
        ),
        "keywords": ["canopy height", "forest"],
        "license": "other",
        "extent": {
            "spatial": {"bbox": [[west, south, east, north]]},
            "temporal": {"interval": [interval]},
        },
        "summaries": {
            "gsd": [round(prepared.tiling.area.gsd_m, 6)],
            "processing:software": {"canopy": pins["canopy"]["version"]},
        },
        "item_assets": {
            "canopy_height": {**MAP_ASSET, "bands": band_facts(prepared.bands, settings.encoding)},
        },
        "assets": assets,
        "links": [
            _link("root", "./catalog.json", _JSON),
            _link("parent", "./catalog.json", _JSON),
            *({**link, "href": f"./{link['href']}"} for link in links),
        ],
    }


def _group(number: int, links: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "type": "Catalog",
        "stac_version": STAC_VERSION,
        "id": f"tiles-{number:05d}",
        "description": f"{len(links)} tiles of the map.",
        "links": [
            _link("root", "../catalog.json", _JSON),
            _link("parent", "../collection.json", _JSON),
            *({**link, "href": f"../{link['href']}"} for link in links),
        ],
    }


def _catalog(prepared: Prepared) -> dict[str, Any]:
    return {
        "type": "Catalog",
        "stac_version": STAC_VERSION,
        "id": f"{_collection_id(prepared)}-catalog",
        "title": "Canopy height map",
        "description": "A canopy height map in tiles, and the model that made it.",
        "links": [
            _link("root", "./catalog.json", _JSON),
            _link("child", "./collection.json", _JSON, "the map"),
            _link("item", "./model.json", _GEOJSON, "the model"),
        ],
    }


def _collection_id(prepared: Prepared) -> str:
    """A name that does not depend on where the folder lies."""
    return f"canopy-height-{output.bare_name(prepared.source.name).split('.')[0]}-{prepared.model_name}"


def _model_facts(prepared: Prepared) -> dict[str, str]:
    return {
        "name": prepared.model_name,
        "sha256": prepared.model.sha256 or "unsaved",
        "licence": str(prepared.model.card.get("licence", "")),
    }


def _link(rel: str, href: str, kind: str, title: str | None = None) -> dict[str, str]:
    return {"rel": rel, "href": href, "type": kind, **({"title": title} if title else {})}


FOLDER = "published"
# World pixels of the published maps, as a power of two: 2 * HALF_WORLD_M / 2**25 = 1.194 m.
LEVEL = 25
LEAST_SHARE = 0.5
YEAR_0 = 2000
_WINDOW = 2048


@dataclass(frozen=True)
class PublishedLayout:
    """One of the published layouts: the zoom of its tiles, and how masks and dates are kept."""

    name: str
    zoom: int

    @property
    def tile_px(self) -> int:
        return 1 << (LEVEL - self.zoom)


LAYOUTS = {
    "published": PublishedLayout("v2", 10),
    "published-v1": PublishedLayout("v1", 9),
    "published-v2": PublishedLayout("v2", 10),
}


def write_published(ledger: Ledger, prepared: Prepared, layout: PublishedLayout | None = None) -> Path:
    """Assemble DIR/published from the finished tiles; tiles that are there already are made again.

    Raises:
        ConfigError: a run whose pixels are not those of quadkeys, or coarser than the published 1.194 m.
        OutputError: a file cannot be written.
    """
    settings = prepared.settings
    layout = layout or LAYOUTS[settings.layout]
    tiling = prepared.tiling
    ratio = published_ratio(tiling)
    folder = settings.folder / FOLDER
    for name in ("chm", "metadata", *(["msk"] if layout.name == "v1" else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = {(row.task.row, row.task.col): row for row in ledger.rows("done")}
    features = []
    for quadkey in quadkeys(prepared.aoi, layout.zoom):
        dates = _write_tile(folder, quadkey, layout, _Mosaic(settings.folder, tiling, ratio, rows))
        outline = quadkey_grid(quadkey, 1).outline("EPSG:4326")
        geometry = json.loads(json.dumps(outline.__geo_interface__))
        properties: dict[str, Any] = {"tile": quadkey}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
        if layout.name == "v1":
            acquired = {
                "type": "Feature",
                "geometry": geometry,
                "properties": {"acq_date": dates[-1] if dates else None},
            }
            write_json(
                folder / "metadata" / f"{quadkey}.geojson",
                {"type": "FeatureCollection", "features": [acquired]},
            )
    write_json(folder / "tiles.geojson", {"type": "FeatureCollection", "features": features})
    return folder


def published_ratio(tiling: Tiling) -> int:
    """Pixels of the run along one of the published maps'. Raises ConfigError where that is not whole."""
    published = 2 * HALF_WORLD_M / (1 << LEVEL)
    ratio = round(published / tiling.area.pixel[0])
    if tiling.kind != "quadkey" or ratio < 1:
        raise ConfigError(
            "the published layout is assembled from quadkey tiles of 1.194 m (EPSG:3857) or finer",
            where="--layout", remedy="use --grid quadkey, and --gsd 1 or smaller",
        )  # fmt: skip
    return ratio


@dataclass(frozen=True)
class _Mosaic:
    """The run's finished tiles on the published pixel."""

    folder: Path
    tiling: Tiling
    ratio: int
    rows: dict[tuple[int, int], Row]

    def read(self, window: Grid) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Metres, years since 2000 (255: unknown or not mapped), both (h, w), and dates, on a window.

        A pixel is the mean of the run's valid pixels in it, where these are at least half of it.
        """
        k, (height, width) = self.ratio, window.shape
        row, col = (v * k for v in window.origin_rc)
        fine = np.full((height * k, width * k), np.nan, np.float32)
        year = np.full((height, width), 255, np.uint8)
        dates: set[str] = set()
        for task, found in self._touching(row, col, *fine.shape):
            top, left, h, w = self.tiling.offset(task.row, task.col)
            row0, col0 = self.tiling.area.origin_rc
            top, left = top + row0 - row, left + col0 - col  # in `fine`; may begin or end outside
            r0, c0, r1, c1 = (
                max(0, top),
                max(0, left),
                min(fine.shape[0], top + h),
                min(fine.shape[1], left + w),
            )
            with rasterio.open(tile_path(self.folder, task.id)) as dataset:
                part = dataset.read(1, window=Window(c0 - left, r0 - top, c1 - c0, r1 - r0), masked=True)
                fine[r0:r1, c0:c1] = part.astype(np.float32).filled(np.nan) * dataset.scales[0]
            days = found.facts.get("dates", [])
            dates.update(days)
            if days:
                here = np.s_[r0 // k : -(-r1 // k), c0 // k : -(-c1 // k)]
                year[here] = np.uint8(min(254, max(0, int(days[-1][:4]) - YEAR_0)))
        blocks = fine.reshape(height, k, width, k)
        known = np.isfinite(blocks)
        share = known.mean(axis=(1, 3))
        total = np.where(known, blocks, 0).sum(axis=(1, 3), dtype=np.float64)
        height_m = np.divide(
            total, known.sum(axis=(1, 3)), out=np.full((height, width), np.nan), where=share > 0
        )
        height_m[share < LEAST_SHARE] = np.nan
        year[~np.isfinite(height_m)] = 255
        return height_m.astype(np.float32), year, sorted(dates)

    def _touching(self, row: int, col: int, height: int, width: int) -> Iterator[tuple[TileTask, Row]]:
        side = self.tiling.tile_px
        for i in range(row // side, -(-(row + height) // side)):
            for j in range(col // side, -(-(col + width) // side)):
                if (i, j) in self.rows:
                    yield self.rows[i, j].task, self.rows[i, j]


def _write_tile(folder: Path, quadkey: str, layout: PublishedLayout, mosaic: _Mosaic) -> list[str]:
    """Write one published tile and what belongs to it; returns the days of its imagery."""
    grid = quadkey_grid(quadkey, layout.tile_px)
    path = folder / "chm" / f"{quadkey}.tif"
    dates: set[str] = set()
    with raster_env():
        writer = CogWriter(path, grid, [BandSpec("canopy_height", "m")], encoding="uint8m", overwrite=True)
        with writer, _plain(_side_file(folder, quadkey, layout), grid) as write_side:
            for top, left, window in _windows(grid, mosaic.tiling.area):
                height_m, year, days = mosaic.read(window)
                valid = np.isfinite(height_m)
                if not valid.any():
                    continue
                dates.update(days)
                writer.write(height_m[None], valid, top, left)
                write_side(np.where(valid, 0, 255) if layout.name == "v1" else year, top, left)
    return sorted(dates)


def _side_file(folder: Path, quadkey: str, layout: PublishedLayout) -> Path:
    """The mask of v1, the dates of v2."""
    return (
        folder / "msk" / f"{quadkey}.tif.msk"
        if layout.name == "v1"
        else folder / "metadata" / f"{quadkey}.tif"
    )


def _windows(grid: Grid, area: Grid) -> Iterator[tuple[int, int, Grid]]:
    """Windows of a published tile that the run's area touches."""
    west, south, east, north = area.bounds
    for top in range(0, grid.height, _WINDOW):
        for left in range(0, grid.width, _WINDOW):
            window = grid.window(top, left, min(_WINDOW, grid.height - top), min(_WINDOW, grid.width - left))
            w, s, e, n = window.bounds
            if w < east and e > west and s < north and n > south:
                yield top, left, window


@contextlib.contextmanager
def _plain(path: Path, grid: Grid) -> Iterator[Callable[[np.ndarray, int, int], None]]:
    """A tiled uint8 GeoTIFF of 255; gives what stores (h, w) values at (row, col)."""
    with replacing(path) as part:
        try:
            dataset = rasterio.open(
                part, "w", driver="GTiff", dtype="uint8", count=1, nodata=255, tiled=True,
                height=grid.height, width=grid.width, crs=grid.crs.to_wkt(), transform=grid.transform,
                blockxsize=512, blockysize=512, compress="deflate", sparse_ok=True, bigtiff="if_safer",
            )  # fmt: skip
        except rasterio.errors.RasterioError as error:
            raise OutputError(f"cannot be written ({error})", where=path) from error

        def write(values: np.ndarray, row: int, col: int) -> None:
            window = Window(col, row, values.shape[1], values.shape[0])
            dataset.write(values.astype(np.uint8), 1, window=window)

        with dataset:
            yield write
