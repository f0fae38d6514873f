"""What a regional run is asked for: the options of `canopy map`, and the keys of configs/region/*.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from canopy.config import Settings
from canopy.errors import ConfigError
from canopy.geo.aoi import AOI
from canopy.geo.choose import choose_area
from canopy.inference.region.pins import Pins

Layout = Literal["tiles", "published", "published-v1", "published-v2"]


class RegionSettings(Settings):
    """Options of a regional run; names and meanings are those of `canopy map --help`.

    `out`, the area, imagery, model and the map's options are pinned to the run. How it is run (`scheduler` to
    `readers`) may change from one start to the next.
    """

    out: str
    bbox: str | None = None
    size_m: float | None = None
    bounds: str | None = None
    bounds_crs: str = "EPSG:4326"
    aoi: str | None = None

    images: tuple[str, ...] = ()
    imagery: str | None = None
    datetime: str | None = None
    bands: str | None = None
    nodata: float | None = None
    scale: float | None = None
    input_crs: str | None = None
    model: str = "default"

    grid: Literal["quadkey", "utm"] = "quadkey"
    zoom: int = Field(default=10, ge=1, le=24)
    tile_px: int = Field(default=4096, ge=16, le=32768)
    crs: str | None = None
    gsd: float | None = None
    encoding: str = "float32"
    date_band: bool = False
    interval: float | None = Field(default=None, gt=0, lt=1)
    quality_band: bool = False
    radiometry: str = "none"
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    layout: Layout = "tiles"

    scheduler: str = "local"
    workers: int | None = Field(default=None, ge=1)
    shard: str | None = None
    device: str = "auto"
    batch_size: int | str = "auto"
    readers: int = Field(default=2, ge=1)
    attempts: int = Field(default=4, ge=1)
    price: float | None = Field(default=None, ge=0)

    @field_validator("tile_px")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out).expanduser()

    def area(self) -> AOI | None:
        """The area that was asked for; None if none was. Raises AreaError."""
        return choose_area(
            bbox=self.bbox, size_m=self.size_m, bounds=self.bounds, bounds_crs=self.bounds_crs, aoi=self.aoi
        )

    def parse_shard(self) -> tuple[int, int] | None:
        """(I, N) of `--shard I/N`, I from 1; None without. Raises ConfigError."""
        if self.shard is None:
            return None
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(
                f"cannot read {self.shard!r}", where="--shard", expected="I/N with I from 1 to N, e.g. 3/16"
            )
        return int(found[1]), int(found[2])


def settings_from(pins: Pins, now: RegionSettings) -> RegionSettings:
    """The pinned settings of a run, with how it is run (workers, device, ...) from `now`.

    What `now` says of pinned things stays too, for `refuse_changes` to judge; None and `auto` say nothing.
    """
    imagery, made = pins["imagery"], pins["map"]
    pinned = {
        "images": tuple(imagery["images"]),
        **{key: imagery[key] for key in ("imagery", "datetime", "bands", "nodata", "scale", "input_crs")},
        "model": pins["model"]["file"],
        **{
            key: made[key]
            for key in (
                "grid", "zoom", "tile_px", "crs", "gsd", "encoding", "date_band", "interval", "quality_band",
                "radiometry", "precision", "threads",
            )
        },
        "backend": made.get("backend", "torch"),  # all there was when runs were not pinned to one
    }  # fmt: skip
    said = {name for name in now.model_fields_set if getattr(now, name) not in (None, (), "auto")}
    if said & {"images", "imagery"}:
        said |= {"images", "imagery"}  # one stands instead of the other
    return now.model_copy(update={name: value for name, value in pinned.items() if name not in said})
