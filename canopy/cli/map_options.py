"""The options that only `canopy map` has: what a user types, and what --help says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

_GRID, _ENGINE, _RUN = "Tiles", "Engine", "Run"
_HELP_GRID = "Tiles by quadkey (EPSG:3857), or squares of the area's UTM zone (or of --crs)."
_HELP_ZOOM = "Zoom of the tiles; larger ones than --tile-px are divided into work tiles."
_HELP_LAYOUT = "Also write tiles named and stored as in the published maps (v1: zoom 9, v2: zoom 10)."
_HELP_SCHEDULER = "Processes of this machine, or a dask scheduler such as tcp://head:8786."
_HELP_THREADS = "Threads of the network in each worker on a CPU; pinned to the run."
_HELP_SHARD = "Only every N-th tile, from the I-th: for job arrays, without a scheduler."
_HELP_RESUME = "Go on with the run in -o; its area, imagery and model need not be given."

Out = Annotated[str | None, typer.Option("-o", "--out", metavar="DIR", help="Folder of the run.")]
GridKind = Annotated[
    str, typer.Option("--grid", metavar="quadkey|utm", help=_HELP_GRID, rich_help_panel=_GRID)
]
Zoom = Annotated[int, typer.Option("--zoom", help=_HELP_ZOOM, rich_help_panel=_GRID)]
TilePx = Annotated[
    int,
    typer.Option(
        "--tile-px", help="Largest side of a work tile, pixels; a power of two.", rich_help_panel=_GRID
    ),
]
MapCrs = Annotated[
    str | None,
    typer.Option(
        "--crs", help="A projected CRS for --grid utm. Default: the area's UTM zone.", rich_help_panel=_GRID
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="tiles|published|published-v1|published-v2",
        help=_HELP_LAYOUT,
        rich_help_panel=_GRID,
    ),
]
Scheduler = Annotated[
    str, typer.Option("--scheduler", metavar="local|ADDRESS", help=_HELP_SCHEDULER, rich_help_panel=_ENGINE)
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Processes on this machine. Default: one per GPU, else 1.",
        rich_help_panel=_ENGINE,
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help=_HELP_THREADS, rich_help_panel=_ENGINE)]
Readers = Annotated[
    int,
    typer.Option("--readers", help="Threads of a worker that read imagery ahead.", rich_help_panel=_ENGINE),
]
Shard = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help=_HELP_SHARD, rich_help_panel=_ENGINE)
]
Attempts = Annotated[
    int,
    typer.Option("--attempts", help="Tries of a tile before it counts as failed.", rich_help_panel=_ENGINE),
]
Resume = Annotated[bool, typer.Option("--resume", help=_HELP_RESUME, rich_help_panel=_RUN)]
Status = Annotated[
    str | None,
    typer.Option("--status", metavar="DIR", help="Show how a run stands; do nothing.", rich_help_panel=_RUN),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Give failed tiles another chance.", rich_help_panel=_RUN)
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Hash every finished tile again before going on.", rich_help_panel=_RUN),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say tiles, imagery, hours and money; write nothing.", rich_help_panel=_RUN
    ),
]
Price = Annotated[
    float | None,
    typer.Option("--price", help="Price of a worker's hour, for --dry-run.", rich_help_panel=_RUN),
]


@dataclass(frozen=True)
class RegionOptions:
    """What only a region is asked for; names are those of `RegionSettings`, see `canopy.cli.groups`."""

    out: Out = None
    grid: GridKind = "quadkey"
    zoom: Zoom = 10
    tile_px: TilePx = 4096
    crs: MapCrs = None
    layout: Layout = "tiles"
    scheduler: Scheduler = "local"
    workers: Workers = None
    threads: Threads = None
    shard: Shard = None
    readers: Readers = 2
    attempts: Attempts = 4
    price: Price = None
