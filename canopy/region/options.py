"""What a regional run is asked for: the options of `canopy map`, and the keys of configs/region/*.yaml.

They are those of a prediction (`canopy.inference.options`) and, declared here, those of a region.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from canopy.config import option
from canopy.errors import ConfigError
from canopy.inference.options import PredictOptions

_TILES, _ENGINE = "Tiles", "Engine"


class MapOptions(PredictOptions):
    """What to map, and how the run is made.

    The area, imagery, model and the map's options are pinned to the run (`PINNED`). How it is run
    (`scheduler` to `price`) may change from one start to the next.
    """

    out: str | None = option(None, "Folder of the run.", metavar="DIR", flags=("-o", "--out"))
    grid: Literal["quadkey", "utm"] = option(
        "quadkey", "Tiles by quadkey (EPSG:3857), or squares of the area's UTM zone (or of --crs).",
        metavar="quadkey|utm", panel=_TILES,
    )  # fmt: skip
    zoom: Annotated[int, Field(ge=1, le=24)] = option(
        10, "Zoom of the tiles; larger ones than --tile-px are divided into work tiles.", panel=_TILES
    )
    tile_px: Annotated[int, Field(ge=16, le=32768)] = option(
        4096, "Largest side of a work tile, pixels; a power of two.", panel=_TILES
    )
    crs: str | None = option(
        None, "A projected CRS for --grid utm. Default: the area's UTM zone.", panel=_TILES
    )

    scheduler: str = option(
        "local", "Processes of this machine, or a dask scheduler such as tcp://head:8786.",
        metavar="local|ADDRESS", panel=_ENGINE,
    )  # fmt: skip
    workers: Annotated[int | None, Field(ge=1)] = option(
        None, "Processes on this machine. Default: one per GPU, else 1.", panel=_ENGINE
    )
    threads: Annotated[int | None, Field(ge=1)] = option(
        None, "Threads of the network in each worker on a CPU. Default: the machine's, shared out.",
        panel=_ENGINE,
    )  # fmt: skip
    readers: Annotated[int, Field(ge=1)] = option(
        2, "Threads of a worker that read imagery ahead.", panel=_ENGINE
    )
    shard: str | None = option(
        None, "Only every N-th tile, from the I-th: for job arrays, without a scheduler.",
        metavar="I/N", panel=_ENGINE,
    )  # fmt: skip
    attempts: Annotated[int, Field(ge=1)] = option(
        4, "Tries of a tile before it counts as failed.", panel=_ENGINE
    )

    price: Annotated[float | None, Field(ge=0)] = option(
        None, "Price of a worker's hour, for --dry-run.", panel="Run"
    )

    @field_validator("tile_px")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @property
    def folder(self) -> Path:
        """The run's folder. Raises ConfigError where none was given."""
        if not self.out:
            raise ConfigError("no folder was given", where="-o", expected="-o DIR")
        return Path(self.out).expanduser()

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


# Options that say what the map is, and may not change while it is made; the area, the imagery's and the
# model's own names are pinned by what they stand for, see `canopy.region.plan`.
PINNED = (
    "datetime", "input_crs", "bands", "nodata", "scale", "grid", "zoom", "tile_px", "crs", "gsd", "encoding",
    "date_band", "interval", "quality_band", "radiometry", "backend", "precision",
)  # fmt: skip
