"""The options that say which area, the same for every command that has one."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Area"

Bbox = Annotated[
    str | None,
    typer.Option(
        "--bbox",
        metavar="LAT,LON[,LAT,LON]",
        help="Latitude first: a point (see --size-m) or two opposite corners.",
        rich_help_panel=_PANEL,
    ),
]
SizeM = Annotated[
    float | None,
    typer.Option(
        "--size-m",
        help="Side of the square around --bbox LAT,LON, metres; 1000 if not given.",
        rich_help_panel=_PANEL,
    ),
]
Bounds = Annotated[
    str | None,
    typer.Option("--bounds", metavar="W,S,E,N", help="West, south, east, north.", rich_help_panel=_PANEL),
]
BoundsCrs = Annotated[str, typer.Option("--bounds-crs", help="CRS of --bounds.", rich_help_panel=_PANEL)]
Aoi = Annotated[
    str | None,
    typer.Option(
        "--aoi",
        metavar="FILE",
        help="Polygons of any vector file; outside is nodata.",
        rich_help_panel=_PANEL,
    ),
]
