"""What lies beside a map's GeoTIFF: its STAC Item, and a picture for a glance without a GIS.

The item says where, when, from what and by which model, and the hash of the file. The GeoTIFF holds no
wall-clock time; `created` in the item is the only one.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely.geometry

from canopy import __version__
from canopy.files import is_url, replacing
from canopy.geo.cog import encoding_named
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.geo.grid import Grid
from canopy.inference.layers import Band
from canopy.inference.output import commercial_use

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from canopy.inference.backends import Choice, Runner
    from canopy.inference.output import Scenes
    from canopy.models.height import HeightModel
    from canopy.terms import Terms


PROJECTION, RASTER, FILE, PROCESSING = (
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in ("projection/v2.0.0", "raster/v1.1.0", "file/v2.1.0", "processing/v1.1.0")
)
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
MAP_ASSET = {"type": COG_TYPE, "title": "Canopy height, metres", "roles": ["data"]}


def model_facts(model: HeightModel, name: str, runner: Runner | Choice) -> dict[str, str]:
    """What a STAC item says of the model and its runtime."""
    return {
        "name": name,
        "sha256": model.sha256 or "unsaved",
        "licence": str(model.card.get("licence", "")),
        "backend": runner.backend,
        "precision": runner.precision,
    }


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
    quicklook: Path | None = None,
    created: datetime.datetime | None = None,
) -> dict[str, Any]:
    """A map's STAC Item as JSON-ready values.

    Args:
        path, grid: the GeoTIFF, and its grid.
        sha256: hex digest of its bytes.
        scenes: what it was derived from.
        model: see `model_facts`.
        statistics: mean, maximum and valid percent of band 1.
        quicklook: the PNG, if there is one.
    """
    import pystac

    now = (created or datetime.datetime.now(datetime.UTC)).astimezone(datetime.UTC).replace(microsecond=0)
    outline = grid.outline("EPSG:4326")
    days = sorted(
        datetime.datetime.fromisoformat(f"{day[:10]}T00:00:00+00:00") for day in scenes.dates if day
    )
    # Unknown dates become the widest true statement: some time before now.
    first, last = (days[0], days[-1]) if days else (datetime.datetime(1900, 1, 1, tzinfo=datetime.UTC), now)
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


def draw_scale_bar(axes: Axes, shape: tuple[int, ...], metres_per_px: float) -> None:
    """A bar of a round length, about a fifth of a picture (h, w), in its lower left corner."""
    length_m = round_length(shape[1] * metres_per_px / 5)
    label = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
    x, y, width = 0.03, 0.035, length_m / (metres_per_px * shape[1])
    for colour, thick in (("black", 5), ("white", 3)):
        axes.plot(
            [x, x + width], [y, y], transform=axes.transAxes, color=colour, lw=thick, solid_capstyle="butt"
        )
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y + 0.02, label, transform=axes.transAxes, color="white", fontsize=8, va="bottom", bbox=box)


def round_length(metres: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not above `metres`.

    >>> round_length(437), round_length(0.13)
    (200.0, 0.1)
    """
    power = 10.0 ** np.floor(np.log10(metres))
    return float(max(step * power for step in (1, 2, 5) if step * power <= metres * (1 + 1e-9)))


LONG_SIDE_PX = 1400
NODATA_COLOUR = "#c9c9c9"
# Dark ground to bright crowns, even in perceived lightness, readable for the colour-blind and in grey.
COLOURS = "viridis"


def write_quicklook(map_path: Path, png_path: Path, *, title: str, subtitle: str = "") -> None:
    """Draw band 1 of a height map with a colour bar in metres and a scale bar.

    Large maps are read through their overviews, so memory does not grow with the map. Missing is grey.

    Raises:
        OutputError: the picture cannot be written; no partial file is left.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights, grid = _overview(map_path)
    known = heights[np.isfinite(heights)]
    # The 99.5th percentile rounded up to 5 m, at least 5 m.
    top = max(5.0, np.ceil(np.percentile(known, 99.5) / 5) * 5) if known.size else 5.0
    ratio = heights.shape[0] / heights.shape[1]
    width = 8.0
    figure = Figure(
        figsize=(width + 1.1, float(np.clip(width * ratio, 2.0, 16.0)) + 0.9), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps[COLOURS].with_extremes(bad=NODATA_COLOUR)
    image = axes.imshow(heights, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(subtitle, fontsize=8, loc="left", color="0.35")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, extend="max")
    bar.set_label("canopy height (m)")
    draw_scale_bar(axes, heights.shape, grid.gsd_m * grid.width / heights.shape[1])
    with replacing(png_path, "cannot write the quicklook") as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})


def _overview(path: Path) -> tuple[np.ndarray, Grid]:
    """Band 1 in metres with NaN where missing, at most `LONG_SIDE_PX` a side, and the map's full grid."""
    import rasterio
    from rasterio.enums import Resampling

    with rasterio.open(path) as dataset:
        shrink = max(1.0, max(dataset.height, dataset.width) / LONG_SIDE_PX)
        shape = (max(1, round(dataset.height / shrink)), max(1, round(dataset.width / shrink)))
        band = dataset.read(1, out_shape=shape, masked=True, resampling=Resampling.average)
        heights = np.ma.filled(band.astype(np.float32), np.nan) * dataset.scales[0] + dataset.offsets[0]
        return heights, Grid.of(dataset.crs.to_wkt(), dataset.transform, dataset.shape)
