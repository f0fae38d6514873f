"""The STAC Item beside a map: where, when, from what, by which model, and the hash of the file.

Plain JSON after STAC 1.1.0 with the extensions projection v2, raster v1.1, file v2.1 and processing v1.1
(https://stac-extensions.github.io). Bands are said twice: as `bands`, which STAC has had since 1.1, and as
the raster extension's `raster:bands`, which most readers know. The TIFF holds no wall-clock time; `created`
here is the only one.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy import __version__
from canopy.files import replacing
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.geo.encoding import encoding_named
from canopy.geo.grid import Grid

STAC_VERSION = "1.1.0"
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
RASTER = "https://stac-extensions.github.io/raster/v1.1.0/schema.json"
FILE = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
PROCESSING = "https://stac-extensions.github.io/processing/v1.1.0/schema.json"
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
MAP_ASSET = {"type": COG_TYPE, "title": "Canopy height, metres", "roles": ["data"]}


@dataclass(frozen=True)
class MapFacts:
    """What the item says about a map.

    Attributes:
        path: the GeoTIFF.
        sha256: hex digest of its bytes.
        grid: its grid.
        encoding: float32, uint16cm or uint8m.
        bands: names and units, in order.
        dates: acquisition dates of the imagery, ISO; empty where unknown.
        imagery: links (name, href) to what it was derived from.
        model: name, sha256 and licence of the model.
        quicklook: the PNG, if there is one.
        statistics: mean, maximum and valid percent of band 1.
    """

    path: Path
    sha256: str
    grid: Grid
    encoding: str
    bands: tuple[tuple[str, str], ...]
    dates: tuple[str, ...]
    imagery: tuple[tuple[str, str], ...]
    model: dict[str, str]
    quicklook: Path | None = None
    statistics: dict[str, float] | None = None


def map_item(facts: MapFacts, created: datetime.datetime | None = None) -> dict[str, Any]:
    """The item as JSON-ready values."""
    now = _utc(created or datetime.datetime.now(datetime.UTC))
    outline = facts.grid.outline("EPSG:4326")
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [PROJECTION, RASTER, FILE, PROCESSING],
        "id": facts.path.stem,
        # Half a pixel of slack keeps a handful of the hundreds of points that follow a curved edge.
        "geometry": _plain(outline.simplify(facts.grid.gsd_m / 2 / METRES_PER_DEGREE).__geo_interface__),
        "bbox": _bbox(outline),
        "properties": {
            **_when(facts.dates, now),
            "created": now,
            "title": "Canopy height",
            "gsd": round(facts.grid.gsd_m, 6),
            **_projection(facts.grid),
            "processing:software": {"canopy": __version__},
            "processing:lineage": f"canopy height predicted from RGB by the model {facts.model['name']}",
            "canopy:model": facts.model,
        },
        "links": [{"rel": "derived_from", "href": href, "title": name} for name, href in facts.imagery],
        "assets": _assets(facts),
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON, whole or not at all; OutputError where that is impossible."""
    with replacing(path) as part:
        part.write_text(
            json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _assets(facts: MapFacts) -> dict[str, Any]:
    assets: dict[str, Any] = {
        "canopy_height": {
            "href": f"./{facts.path.name}",
            **MAP_ASSET,
            # A multihash: 0x12 says sha2-256, 0x20 that 32 bytes follow.
            "file:checksum": f"1220{facts.sha256}",
            "file:size": facts.path.stat().st_size,
            "bands": _bands(facts),
            "raster:bands": _raster_bands(facts),
        }
    }
    if facts.quicklook is not None:
        assets["quicklook"] = {
            "href": f"./{facts.quicklook.name}",
            "type": "image/png",
            "title": "Quicklook",
            "roles": ["overview"],
        }
    return assets


def band_facts(bands: tuple[tuple[str, str], ...], encoding: str) -> list[dict[str, Any]]:
    """What STAC itself says of bands (names and units) that are stored in an encoding."""
    stored = encoding_named(encoding)
    facts = {"data_type": stored.dtype, "nodata": "nan" if math.isnan(stored.nodata) else stored.nodata}
    return [{"name": name, **facts, "unit": unit} for name, unit in bands]


def _bands(facts: MapFacts) -> list[dict[str, Any]]:
    """The map's bands, with the statistics of the first."""
    bands = band_facts(facts.bands, facts.encoding)
    if facts.statistics and all(math.isfinite(value) for value in facts.statistics.values()):
        bands[0]["statistics"] = facts.statistics
    return bands


def _raster_bands(facts: MapFacts) -> list[dict[str, Any]]:
    """The same, and what the raster extension adds."""
    # Days and flags are stored as they are; only heights are scaled.
    scale = encoding_named(facts.encoding).step_m
    more = {"offset": 0, "sampling": "area", "spatial_resolution": round(facts.grid.gsd_m, 6)}
    return [{**band, "scale": scale if band["unit"] == "m" else 1.0, **more} for band in _bands(facts)]


def _projection(grid: Grid) -> dict[str, Any]:
    west, south, east, north = grid.bounds
    epsg = grid.crs.epsg
    code: dict[str, Any] = {"proj:code": f"EPSG:{epsg}"}
    if epsg is None:
        code = {"proj:code": None, "proj:wkt2": grid.crs.to_wkt()}
    return {
        **code,
        "proj:shape": [grid.height, grid.width],
        "proj:transform": [*grid.transform][:6],
        "proj:bbox": [west, south, east, north],
    }


def _when(dates: tuple[str, ...], now: str) -> dict[str, Any]:
    """Acquisition time. Unknown dates become the widest true statement: some time before now."""
    days = sorted(date[:10] for date in dates if date)
    if not days:
        return {"datetime": None, "start_datetime": "1900-01-01T00:00:00Z", "end_datetime": now}
    if days[0] == days[-1]:
        return {"datetime": f"{days[0]}T00:00:00Z"}
    return {
        "datetime": None,
        "start_datetime": f"{days[0]}T00:00:00Z",
        "end_datetime": f"{days[-1]}T23:59:59Z",
    }


def _utc(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _bbox(outline: Any) -> list[float]:
    """West, south, east, north; west > east where the outline crosses the antimeridian (RFC 7946, 5.2)."""
    west, south, east, north = outline.bounds
    parts = getattr(outline, "geoms", [outline])
    if west <= -180 + 1e-9 and east >= 180 - 1e-9 and len(parts) > 1:
        west = min(part.bounds[0] for part in parts if part.bounds[0] > 0)
        east = max(part.bounds[2] for part in parts if part.bounds[2] < 0)
    return [float(value) for value in (west, south, east, north)]


def _plain(geometry: Any) -> Any:
    """Tuples to lists, as JSON has them."""
    return json.loads(json.dumps(geometry))
