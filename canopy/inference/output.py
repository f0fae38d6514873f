"""Where a map goes: names settled before any work, the tags that travel with it, a map in memory.

`canopy.inference.companions` makes what lies beside the GeoTIFF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from canopy import __version__
from canopy.errors import ConfigError
from canopy.files import is_url, redact
from canopy.geo.cog import ENCODINGS
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
