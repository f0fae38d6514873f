"""What is shown: the maps and images that were named, found or offered, and what the page is told of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapely

from canopy.errors import CanopyError, InputError
from canopy.files import is_template, is_url, redact
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.imagery.base import ImagerySource
from canopy.imagery.open import open_imagery, open_pinned
from canopy.inference.picture import COLOURS
from canopy.region.ledger import read_pins
from canopy.runtime import log
from canopy.viewer.layers import LONLAT, HeightLayer, ImageLayer

STATIC = Path(__file__).parent / "static"
# The colours' upper end at first, for all maps, so that two pages look alike; the page has sliders.
TOP_M = 40
_RAMP_STEPS = 64
_OPENSTREETMAP = {
    "name": "OpenStreetMap",
    "template": "https://tile.openstreetmap.org/{z}/{x}/{y}.png",
    "attribution": "© OpenStreetMap contributors",
}


@dataclass(frozen=True)
class View:
    """What a page shows.

    Attributes:
        layers: one or two height maps. image: the image under them, if any.
        bases: base maps on offer, each `name`, `template` and `attribution`; nothing of them is loaded before
            the user chooses one.
        base: name of the one that was chosen by --imagery.
    """

    layers: tuple[HeightLayer, ...]
    image: ImageLayer | None
    bases: tuple[Mapping[str, str], ...]
    base: str | None

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north of all maps, in degrees."""
        return _bounds(self.layers)

    def config(self) -> dict[str, Any]:
        """What the page is told, JSON-ready."""
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        ramp = colormaps[COLOURS]
        image = self.image and {
            "name": Path(self.image.name).name or self.image.name, **_tiles_of(self.image)
        }  # fmt: skip
        return {
            "layers": [
                {
                    "name": layer.name,
                    "about": _about(layer),
                    "by": _by(layer),
                    "notes": list(layer.heights.notes),
                    "gsd_m": layer.heights.gsd_m,
                    **_tiles_of(layer),
                }
                for layer in self.layers
            ],
            "image": image,
            "bounds": self.bounds,
            "bases": [dict(base) for base in self.bases],
            "base": self.base,
            "ramp": [to_hex(ramp(step / (_RAMP_STEPS - 1))) for step in range(_RAMP_STEPS)],
            "top_m": TOP_M,
            "static": False,
        }


def open_view(maps: Sequence[str], imagery: str | None) -> View:
    """Open the maps and the image under them.

    Args:
        maps: one or two height maps: files, folders of tiles, or of `canopy map` (or its catalog.json).
        imagery: what `open_imagery` takes, or a web-tile template; None: what the first map was made from,
            where its tags name something that is on this computer.

    Raises:
        InputError: one of them cannot be read.
    """
    sources = [
        str(Path(name).parent) if Path(name).name in ("catalog.json", "collection.json") else name
        for name in maps
    ]
    layers = tuple(HeightLayer(source) for source in sources)
    if len({layer.name for layer in layers}) < len(layers):  # told apart by their folders
        for layer, path in zip(layers, sources, strict=True):
            layer.name = "/".join(Path(path).absolute().parts[-2:])
    bounds = _bounds(layers)
    bases, base = [_OPENSTREETMAP], None
    if imagery is not None and is_template(imagery):
        base = redact(imagery)
        bases.append(_template(imagery))
        source = None
    elif imagery is not None:
        area = AOI(shapely.box(*bounds), to_crs(LONLAT), True)
        source = open_imagery(imagery, area=area, overviews=True)
    else:
        tag = layers[0].heights.tags.get("CANOPY_IMAGERY", "")
        source = _own_imagery(Path(sources[0]), tag)
        if is_template(origin := tag.split(": ")[0]):
            bases.append(_template(origin))
    if source is not None:
        outline = source.area()
        if outline is not None and not outline.lonlat.intersects(shapely.box(*bounds)):
            if imagery is not None:
                raise InputError("does not lie under the map", where=imagery, expected="imagery of its area")
            source = None
    return View(layers, ImageLayer(source, bounds) if source else None, tuple(bases), base)


def _template(url: str) -> dict[str, str]:
    return {"name": redact(url), "template": url, "attribution": ""}


def _own_imagery(place: Path, tag: str) -> ImagerySource | None:
    """What a map was made from, where that is on this computer; None, with a word in the log, where not."""
    try:
        pins = read_pins(place) if place.is_dir() else None
        pin = pins["imagery"]["pin"] if pins else None
        if pin and pin["kind"] == "scenes":
            if any(is_url(href) for scene in pin["scenes"] for href in scene["assets"]):
                return None
            return open_pinned(pin | {"options": pin["options"] | {"overviews": True}})
        if re.match(r"demo(:|$)", tag) or (pin and pin["kind"] == "demo"):
            return open_imagery("demo")
        names = tag.split(": ")[-1].split(", ")
        folders = [place if place.is_dir() else place.parent, Path.cwd()]
        for folder in folders:
            files = [folder / name for name in names]
            if tag and all(file.is_file() for file in files):
                return open_imagery(files if len(files) > 1 else files[0], overviews=True)
    except CanopyError as error:
        log.warning(f"note: no image under the map: {error}")
    return None


def _by(layer: HeightLayer) -> str:
    """Who made the heights, and whose imagery they were made from: the map's attribution."""
    tags = layer.heights.tags
    credit = tags.get("CANOPY_IMAGERY_ATTRIBUTION")
    return tags.get("CANOPY_MODEL", layer.name) + (f" (imagery: {credit})" if credit else "")


def _about(layer: HeightLayer) -> list[str]:
    """Lines that say whose heights these are, of what and when."""
    heights = layer.heights
    tags = heights.tags
    size = f"{heights.gsd_m:.3g} m" + (f" in {len(heights.tiles):,} files" if len(heights.tiles) > 1 else "")
    lines = [
        f"model {tags['CANOPY_MODEL']}" if "CANOPY_MODEL" in tags else "",
        f"imagery {tags['CANOPY_IMAGERY']}" if "CANOPY_IMAGERY" in tags else "",
        f"imagery's licence {tags['CANOPY_IMAGERY_LICENCE']}" if "CANOPY_IMAGERY_LICENCE" in tags else "",
        "taken " + " to ".join(heights.dates) if heights.dates else "date unknown",
        f"pixels of {size}",
    ]
    return [line for line in lines if line]


def _tiles_of(layer: HeightLayer | ImageLayer) -> dict[str, Any]:
    """Where a layer has tiles: bounds in degrees, and the zooms of its finest and of sensible coarse ones."""
    west, south, east, north = layer.pyramid.bounds
    # The zoom where all of it is smaller than a tile.
    span = max((east - west) / 360, (north - south) / 180, 1e-9)
    smallest = min(max(int(-math.log2(span)) - 1, 0), layer.pyramid.deepest)
    return {"bounds": [west, south, east, north], "min_zoom": smallest, "max_zoom": layer.pyramid.deepest}


def _bounds(layers: Sequence[HeightLayer]) -> tuple[float, float, float, float]:
    """West, south, east, north."""
    west, south, east, north = shapely.union_all(
        [shapely.box(*layer.heights.outline.bounds) for layer in layers]
    ).bounds
    return west, south, east, north
