"""The STAC catalog of a region: what was mapped, where, when, from what, by which model; every file's hash.

    DIR/catalog.json            the catalog
    DIR/collection.json         the map: extent, dates, licence, links to all tiles
    DIR/tiles/ID.json           one item per tile (projection, raster, file and processing extensions)
    DIR/stac/GROUP.json         where there are many tiles: catalogs of up to a thousand of them each
    DIR/model.json              the model (MLM extension)

Plain STAC 1.1.0 JSON from the ledger's rows and the run's pins alone, so the same run gives the same catalog.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from canopy.inference import output
from canopy.inference.region.ledger import Ledger, Row
from canopy.inference.region.mosaic import MOSAIC, OVERVIEW
from canopy.inference.region.pins import Pins, area_of
from canopy.inference.region.plan import Prepared
from canopy.inference.region.task import tile_path
from canopy.inference.stac_item import (
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
