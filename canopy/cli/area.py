"""The options that say which area, the same for every command that has one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from canopy.geo.aoi import AOI

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


@dataclass(frozen=True)
class AreaOptions:
    """Which area; see `canopy.cli.groups`."""

    bbox: Bbox = None
    size_m: SizeM = None
    bounds: Bounds = None
    bounds_crs: BoundsCrs = "EPSG:4326"
    aoi: Aoi = None

    def choose(self) -> AOI | None:
        """The area that was asked for; None if none was. Raises AreaError."""
        from canopy.geo.choose import choose_area

        return choose_area(**asdict(self))
