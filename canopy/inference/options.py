"""What a user asks of a prediction, as data: the options of `canopy predict` and of `canopy.predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from canopy.geo.area import AOI
from canopy.inference.estimate import MAX_PIXELS

if TYPE_CHECKING:
    from canopy.models.height import HeightModel


class Options(TypedDict, total=False):
    """Options of `canopy.predict` beyond what to map, with which model, and where to; see `Request`."""

    gsd: float | None
    crs: str | None
    input_crs: str | None
    device: str
    backend: str
    precision: str
    batch_size: int | str
    workers: int | str
    datetime: str | None
    bands: str | Sequence[int] | None
    nodata: float | None
    scale: float | None
    encoding: str
    date_band: bool
    interval: float | None
    quality_band: bool
    quicklook: bool
    radiometry: str
    overwrite: bool
    max_pixels: int


@dataclass(frozen=True)
class Request:
    """What the user asked for; the names are those of `canopy predict`'s options.

    Attributes:
        images: files, directories or URLs; several are mosaicked.
        imagery: a named source, STAC address, tile template or path, instead of `images`.
        area: what to map; by default all the imagery.
        model: a name, a file, or a loaded model.
        out: the GeoTIFF to write; None keeps the map in memory.
        crs: CRS of the map, or `image`; also the CRS of images that carry none, unless `input_crs` is given.
        input_crs: CRS of images that carry none.
        backend, precision: see `canopy.inference.backends`.
        interval: coverage of the bands height_lower and height_upper, e.g. 0.9; None writes none.
        quality_band: add the band `quality`, see `canopy.inference.layers`.
        radiometry: `none`, `match`, or percentiles; see `canopy.models.height.parse_radiometry`.
    """

    images: tuple[str, ...] = ()
    imagery: str | None = None
    area: AOI | None = None
    model: str | Path | HeightModel = "default"
    out: str | Path | None = None
    gsd: float | None = None
    crs: str | None = None
    input_crs: str | None = None
    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    batch_size: int | str = "auto"
    workers: int | str = "auto"
    datetime: str | None = None
    bands: str | Sequence[int] | None = None
    nodata: float | None = None
    scale: float | None = None
    encoding: str = "float32"
    date_band: bool = False
    interval: float | None = None
    quality_band: bool = False
    quicklook: bool = False
    radiometry: str = "none"
    overwrite: bool = False
    max_pixels: int = MAX_PIXELS
