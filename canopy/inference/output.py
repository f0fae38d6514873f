"""Where a map goes: names settled before any work, tags, the STAC Item beside it, a map in memory.

The item says where, when, from what and by which model, and the hash of the file. The GeoTIFF holds no
wall-clock time; `created` in the item is the only one.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import shapely.geometry

from canopy import __version__
from canopy.errors import ConfigError
from canopy.files import is_url, redact
from canopy.geo.cog import ENCODINGS, encoding_named
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.geo.grid import Grid
from canopy.inference.layers import HEIGHT_BAND, Band, Extras
from canopy.terms import Terms, Use, use_of, weakest

if TYPE_CHECKING:
    import xarray as xr

    from canopy.imagery.base import ImagerySource


# The level whose bands the area model of `canopy.calibration.area` is fitted to.
AREA_LEVEL = 0.9
# Names in a tag beyond this number only make it unreadable; the STAC item has them all.
_TAG_NAMES = 20
PROJECTION, RASTER, FILE, PROCESSING = (
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in ("projection/v2.0.0", "raster/v1.1.0", "file/v2.1.0", "processing/v1.1.0")
)
UNKNOWN = datetime.datetime(1900, 1, 1, tzinfo=datetime.UTC)
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
MAP_ASSET = {"type": COG_TYPE, "title": "Canopy height, metres", "roles": ["data"]}


@dataclass(frozen=True)
class OutputFiles:
    """The files of one map: the GeoTIFF, its STAC item, and its picture (None if not wanted)."""

    tif: Path
    item: Path
    quicklook: Path | None = None

    @classmethod
    def of(cls, out: str | Path, quicklook: bool) -> OutputFiles:
        """The names beside `out`."""
        tif = Path(out).expanduser()
        return cls(tif, tif.with_suffix(".json"), tif.with_suffix(".png") if quicklook else None)

    @property
    def all(self) -> list[Path]:
        """In the order in which they take their names."""
        return [path for path in (self.tif, self.item, self.quicklook) if path is not None]


def default_out(images: Sequence[str], imagery: str | None) -> str:
    """The map's name where none was given: after the only image, else after the source."""
    if len(images) == 1:
        return f"{Path(urlsplit(images[0]).path if is_url(images[0]) else images[0]).stem}_chm.tif"
    if imagery and imagery.replace("-", "").isalnum():
        return f"{imagery}_chm.tif"
    return "chm.tif"


def check_encoding(encoding: str, date_band: bool) -> None:
    """Refuse unknown encodings, and dates in one that ends at 254.

    Raises:
        ConfigError: what is possible instead.
    """
    if encoding not in ENCODINGS:
        raise ConfigError(f"unknown encoding {encoding!r}", where="--encoding", expected=", ".join(ENCODINGS))
    if date_band and encoding == "uint8m":
        raise ConfigError(
            "days since 1970 do not fit into 8 bits",
            where="--date-band",
            remedy="use --encoding uint16cm (where days are whole numbers) or float32",
        )


@dataclass(frozen=True)
class Scenes:
    """What tags say of imagery: all of a source, or those of its scenes that reach into a window.

    Attributes:
        name: of the source.
        scene_ids, dates: of its images; empty where they are not known.
        terms: licence and attribution, where they are known.
    """

    name: str
    scene_ids: tuple[str, ...]
    dates: tuple[str, ...]
    terms: Terms | None = None

    @classmethod
    def of(cls, source: ImagerySource, window: Grid | None = None) -> Scenes:
        """The scenes of a source; of a mosaic those that share ground with `window`."""
        ids, dates = tuple(source.scene_ids), tuple(source.dates)
        records = [scene.record for scene in getattr(source, "scenes", ())]
        if window is None or len(records) < 2:
            return cls(source.name, ids, dates, source.terms)
        place = window.outline("EPSG:4326")
        near = [r for r in records if r.outline is None or r.outline.intersects(place)]
        near = [record for record in near if record.scene_id in ids]
        days = sorted({record.day.isoformat() for record in near if record.day})
        return cls(source.name, tuple(record.scene_id for record in near), tuple(days), source.terms)

    @property
    def names(self) -> tuple[str, ...]:
        """URLs without their query, local files by name only."""
        return tuple(bare_name(name) for name in (self.scene_ids or (self.name,)))


def commercial_use(terms: Terms | None, model_licence: str) -> tuple[Use, str]:
    """Whether a map may be used commercially, by the weaker of its imagery and its model; and why."""
    use = weakest(terms.commercial_use if terms else "ask", use_of(model_licence))
    imagery = terms.licence if terms else "licence not known"
    return use, f"commercial use: {use} (imagery: {imagery}; model: {model_licence or 'not stated'})"


def map_tags(
    scenes: Scenes, model_name: str, model_sha256: str, gsd_m: float, model_licence: str
) -> dict[str, str]:
    """Tags of the GeoTIFF. No wall-clock time, no folders: the same input gives the same bytes anywhere."""
    said = scenes.terms
    terms = {"LICENCE": said.licence, "ATTRIBUTION": said.attribution} if said else {}
    return {
        "CANOPY_VERSION": __version__,
        "CANOPY_MODEL": model_name,
        "CANOPY_MODEL_SHA256": model_sha256,
        "CANOPY_IMAGERY": imagery_text(scenes),
        "CANOPY_DATES": dates_text(scenes.dates),
        "CANOPY_GSD_M": f"{gsd_m:.6g}",
        "CANOPY_COMMERCIAL_USE": commercial_use(said, model_licence)[0],
        **{f"CANOPY_IMAGERY_{key}": text for key, text in terms.items()},
        **({"CANOPY_MODEL_LICENCE": model_licence} if model_licence else {}),
    }


def extra_tags(extras: Extras, card: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say what the bands beside heights mean."""
    tags: dict[str, str] = {}
    if extras.interval is not None:
        from canopy.models.intervals import CARD_KEY

        tags["CANOPY_INTERVAL"] = f"{extras.level:g}"
        calibration = card.get(CARD_KEY, {})
        if "new_place" in calibration:
            tags["CANOPY_INTERVAL_PLACE"] = extras.interval.place
        area = (calibration["new_place"] if extras.interval.place == "new" else calibration).get("area")
        # Bands of another level would be read with the wrong widths.
        if area is not None and extras.level == AREA_LEVEL:
            tags["CANOPY_AREA_MODEL"] = json.dumps({k: v for k, v in area.items() if k != "facts"})
    if extras.quality is not None:
        tags["CANOPY_QUALITY_BITS"] = extras.quality.describe()
    return tags


def imagery_text(scenes: Scenes) -> str:
    """What the pixels came from, in one line without folders or signatures."""
    names = scenes.names
    more = f" and {len(names) - _TAG_NAMES} more" if len(names) > _TAG_NAMES else ""
    origin = bare_name(scenes.name)
    listed = ", ".join(names[:_TAG_NAMES]) + more
    # Files are their own name ("a.tif and 3 more" says nothing that the list does not).
    return listed if origin.startswith(names[0]) else f"{origin}: {listed}"


def bare_name(name: str) -> str:
    """A file's name without its folder; a URL without its query, which may hold a signature."""
    return redact(name) if is_url(name) else Path(name).name or name


def dates_text(dates: Sequence[str]) -> str:
    """`2019-06-01`, `2019-06-01/2021-08-30`, or `unknown`."""
    days = sorted({date[:10] for date in dates if date})
    if not days:
        return "unknown"
    return days[0] if len(days) == 1 else f"{days[0]}/{days[-1]}"


def terms_facts(terms: Terms | None) -> dict[str, Any]:
    """What STAC says of the imagery's terms: `license`, as SPDX names it or `other`, and `providers`."""
    if terms is None:
        return {}
    owner = {"name": terms.attribution, "description": terms.licence, "roles": ["licensor"]}
    return {"license": terms.spdx, "providers": [owner]}


def map_item(
    path: Path,
    grid: Grid,
    *,
    sha256: str,
    encoding: str,
    bands: Sequence[Band],
    scenes: Scenes,
    model: Mapping[str, str],
    statistics: Mapping[str, float],
    findings: Mapping[str, float] | None = None,
    quicklook: Path | None = None,
) -> dict[str, Any]:
    """A map's STAC Item as JSON-ready values.

    Args:
        path, grid: the GeoTIFF, and its grid.
        sha256: hex digest of its bytes.
        scenes: what it was derived from.
        model: its name, hash, licence and runtime.
        statistics: mean, maximum and valid percent of band 1.
        findings: what the map should be known by; see `layers.findings`.
        quicklook: the PNG, if there is one.
    """
    import pystac

    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    outline = grid.outline("EPSG:4326")
    days = sorted(
        datetime.datetime.fromisoformat(f"{day[:10]}T00:00:00+00:00") for day in scenes.dates if day
    )
    # Unknown dates become the widest true statement: some time before now.
    first, last = (days[0], days[-1]) if days else (UNKNOWN, now)
    one = bool(days) and first == last
    code: dict[str, Any] = {"proj:code": f"EPSG:{grid.crs.epsg}"}
    if grid.crs.epsg is None:
        code = {"proj:code": None, "proj:wkt2": grid.crs.to_wkt()}
    item = pystac.Item(
        id=path.stem,
        # Half a pixel of slack keeps a handful of the hundreds of points that follow a curved edge.
        geometry=shapely.geometry.mapping(outline.simplify(grid.gsd_m / 2 / METRES_PER_DEGREE)),
        bbox=_bbox(outline),
        datetime=first if one else None,
        start_datetime=None if one else first,
        end_datetime=None if one else last if not days else last + datetime.timedelta(seconds=86_399),
        properties={
            "created": pystac.utils.datetime_to_str(now),
            "title": "Canopy height",
            "gsd": round(grid.gsd_m, 6),
            **code,
            "proj:shape": [grid.height, grid.width],
            "proj:transform": [*grid.transform][:6],
            "proj:bbox": list(grid.bounds),
            "processing:software": {"canopy": __version__},
            "processing:lineage": f"canopy height predicted from RGB by the model {model['name']}",
            "canopy:model": dict(model),
            "canopy:findings": dict(findings or {}),
            "canopy:commercial_use": commercial_use(scenes.terms, model.get("licence", ""))[0],
            **terms_facts(scenes.terms),
        },
        stac_extensions=[PROJECTION, RASTER, FILE, PROCESSING],
    )
    for name in scenes.names:
        href = name if is_url(name) else name.replace(" ", "%20")
        item.add_link(pystac.Link("derived_from", href, title=name))
    asset = _map_asset(path, grid, sha256, encoding, bands, statistics)
    item.add_asset("canopy_height", pystac.Asset.from_dict(asset))
    if quicklook is not None:
        picture = pystac.Asset(f"./{quicklook.name}", "Quicklook", None, "image/png", ["overview"])
        item.add_asset("quicklook", picture)
    # Through JSON: readers expect lists where shapely has tuples.
    return json.loads(json.dumps(item.to_dict(include_self_link=False, transform_hrefs=False)))


def _map_asset(
    path: Path, grid: Grid, sha256: str, encoding: str, bands: Sequence[Band], statistics: Mapping[str, float]
) -> dict[str, Any]:
    """The GeoTIFF, its bands, and the statistics of the first."""
    facts = band_facts(bands, encoding)
    if all(math.isfinite(value) for value in statistics.values()):
        facts[0]["statistics"] = dict(statistics)
    # Days and flags are stored as they are; only heights are scaled.
    step_m = encoding_named(encoding).step_m
    more = {"offset": 0, "sampling": "area", "spatial_resolution": round(grid.gsd_m, 6)}
    return {
        "href": f"./{path.name}",
        **MAP_ASSET,
        # A multihash: 0x12 says sha2-256, 0x20 that 32 bytes follow.
        "file:checksum": f"1220{sha256}",
        "file:size": path.stat().st_size,
        "bands": facts,
        # The same, and what the raster extension adds: most readers know these.
        "raster:bands": [{**b, "scale": step_m if b["unit"] == "m" else 1.0, **more} for b in facts],
    }


def band_facts(bands: Sequence[Band], encoding: str) -> list[dict[str, Any]]:
    """What STAC itself says of bands (names and units) that are stored in an encoding."""
    stored = encoding_named(encoding)
    facts = {"data_type": stored.dtype, "nodata": "nan" if math.isnan(stored.nodata) else stored.nodata}
    return [{"name": name, **facts, "unit": unit} for name, unit in bands]


def _bbox(outline: Any) -> list[float]:
    """West, south, east, north; west > east where the outline crosses the antimeridian (RFC 7946, 5.2)."""
    west, south, east, north = outline.bounds
    parts = getattr(outline, "geoms", [outline])
    if west <= -180 + 1e-9 and east >= 180 - 1e-9 and len(parts) > 1:
        west = min(part.bounds[0] for part in parts if part.bounds[0] > 0)
        east = max(part.bounds[2] for part in parts if part.bounds[2] < 0)
    return [float(value) for value in (west, south, east, north)]


class ArraySink:
    """Keeps a map in memory: bands (n, height, width) float32, NaN where there is no height."""

    def __init__(self, grid: Grid, bands: Sequence[Band] = (HEIGHT_BAND,)) -> None:
        self.grid, self.bands = grid, tuple(bands)
        self.values = np.full((len(self.bands), *grid.shape), np.nan, np.float32)

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None:
        """Take a window; see `CogWriter.write`."""
        rows, cols = slice(row_off, row_off + valid.shape[0]), slice(col_off, col_off + valid.shape[1])
        self.values[:, rows, cols] = values

    def to_xarray(self, attributes: dict[str, str]) -> xr.DataArray:
        """A DataArray with dims (y, x), or (band, y, x) if there are several, and its CRS for rioxarray."""
        import rioxarray  # noqa: F401  (registers the .rio accessor)
        import xarray as xr

        rows, cols = np.arange(self.grid.height) + 0.5, np.arange(self.grid.width) + 0.5
        transform = self.grid.transform
        coords: dict[str, object] = {
            "y": transform.f + transform.e * rows,
            "x": transform.c + transform.a * cols,
        }
        dims: tuple[str, ...] = ("y", "x")
        values = self.values[0]
        if len(self.values) > 1:
            dims, values = ("band", "y", "x"), self.values
            coords["band"] = [name for name, _ in self.bands]
        array = xr.DataArray(
            values, dims=dims, coords=coords, name="canopy_height",
            attrs={"units": "m", "long_name": "canopy height", **attributes},
        )  # fmt: skip
        array = array.rio.write_crs(self.grid.crs.to_wkt()).rio.write_transform(transform)
        return array.rio.write_nodata(np.nan)
