"""Where a map goes: names settled before any work, facts that travel with it, memory or files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from canopy import __version__
from canopy.errors import ConfigError, ImageryError, InputError
from canopy.geo.encoding import ENCODINGS
from canopy.geo.grid import Grid
from canopy.inference.extras import Extras
from canopy.models.intervals import CARD_KEY
from canopy.sources.paths import is_url, list_directory, redact

if TYPE_CHECKING:
    import xarray as xr

    from canopy.sources.imagery import ImagerySource

# The level whose bands the area model of `canopy.calibration.areas` is fitted to.
AREA_LEVEL = 0.9
BANDS = (("canopy_height", "m"), ("acquisition_date", "d"))
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
        """Derive the names beside `out`; InputError where it is no GeoTIFF's name."""
        tif = Path(out).expanduser()
        if tif.is_dir() or str(out).endswith(("/", os.sep)):
            raise InputError("is a directory", where=out, expected="a file name ending in .tif")
        if tif.suffix.lower() not in (".tif", ".tiff"):
            raise InputError("is not a GeoTIFF's name", where=out, expected="a file name ending in .tif")
        return cls(tif, tif.with_suffix(".json"), tif.with_suffix(".png") if quicklook else None)

    @property
    def all(self) -> list[Path]:
        return [path for path in (self.tif, self.item, self.quicklook) if path is not None]

    def check(self, inputs: Sequence[str], overwrite: bool) -> None:
        """Refuse, before any work, names that exist, name an input, or cannot be written.

        Raises:
            InputError: says which file and what to do.
        """
        taken = {path.resolve() for name in inputs if not is_url(name) for path in _files_of(Path(name))}
        for path in self.all:
            if path.resolve() in taken:
                raise InputError("is one of the inputs", where=path, remedy="choose another name with -o")
            if path.exists() and not overwrite:
                raise InputError(
                    "exists already", where=path, remedy="add --overwrite, or choose another name with -o"
                )
        folder = self.tif.absolute().parent
        if not folder.is_dir():
            raise InputError("no such directory", where=folder, remedy="create it first")
        if not os.access(folder, os.W_OK):
            raise InputError("the directory cannot be written", where=folder)


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the images that are read where a directory is named."""
    try:
        return list_directory(path) if path.is_dir() else [path]
    except ImageryError:  # told where the imagery is opened
        return []


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


class Scenes(Protocol):
    """What tags say of imagery: all of a source, or what a part of a map was made from."""

    @property
    def name(self) -> str: ...
    @property
    def scene_ids(self) -> Sequence[str]: ...
    @property
    def dates(self) -> Sequence[str]: ...


def map_tags(source: Scenes, model_name: str, model_sha256: str, gsd_m: float) -> dict[str, str]:
    """Tags of the GeoTIFF. No wall-clock time, no folders: the same input gives the same bytes anywhere."""
    return {
        "CANOPY_VERSION": __version__,
        "CANOPY_MODEL": model_name,
        "CANOPY_MODEL_SHA256": model_sha256,
        "CANOPY_IMAGERY": imagery_text(source),
        "CANOPY_DATES": dates_text(source.dates),
        "CANOPY_GSD_M": f"{gsd_m:.6g}",
    }


def extra_tags(extras: Extras, card: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say what the bands beside heights mean."""
    tags: dict[str, str] = {}
    if extras.interval is not None:
        tags["CANOPY_INTERVAL"] = f"{extras.level:g}"
        calibration = card.get(CARD_KEY, {})
        if "new_place" in calibration:
            tags["CANOPY_INTERVAL_PLACE"] = extras.interval.place
        area = (calibration["new_place"] if extras.interval.place == "new" else calibration).get("area")
        # Bands of another level would be read with the wrong widths.
        if area is not None and extras.level == AREA_LEVEL:
            tags["CANOPY_AREA_MODEL"] = json.dumps({k: v for k, v in area.items() if k != "facts"})
    if card.get("footprint_gap"):
        tags["CANOPY_FOOTPRINT_GAP"] = json.dumps(card["footprint_gap"])  # for canopy calibrate gedi
    if extras.quality is not None:
        tags["CANOPY_QUALITY_BITS"] = extras.quality.describe()
    return tags


def imagery_text(source: Scenes) -> str:
    """What the pixels came from, in one line without folders or signatures."""
    names = [bare_name(name) for name in (source.scene_ids or (source.name,))]
    more = f" and {len(names) - _TAG_NAMES} more" if len(names) > _TAG_NAMES else ""
    origin = bare_name(source.name)
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


def imagery_links(source: ImagerySource) -> tuple[tuple[str, str], ...]:
    """(name, href) of every scene, for the item's `derived_from` links; local files by name only."""
    names = [bare_name(name) for name in (source.scene_ids or (source.name,))]
    return tuple((name, name if is_url(name) else name.replace(" ", "%20")) for name in names)


class ArraySink:
    """Keeps a map in memory: bands (n, height, width) float32, NaN where there is no height."""

    def __init__(self, grid: Grid, bands: Sequence[tuple[str, str]] = BANDS[:1]) -> None:
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
