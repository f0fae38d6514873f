"""The options of `canopy evaluate`, one name each: what a user types, and what --help says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.predict_options import HELP_BACKEND, HELP_PRECISION

_HELP_MAP = "Height GeoTIFF, folder of tiles, or a published v1 or v2 map."
_HELP_REFERENCE = "Height raster (may be repeated), table of GEDI shots, or field plots."
_HELP_BY = (
    "site, height, cover, slope, a column, NAME=classes.tif, NAME=zones.gpkg:COLUMN; several with commas."
)
_HELP_STAT = "What a pixel, footprint or plot takes. Default: mean; for GEDI the column's percentile."
_HELP_FLOOR = "Heights below this count as 0 on both sides (NEON's height models: 2, or 0.667 m)."
_HELP_BENCHMARK = "Named benchmark: neon-test, sao-paulo, california, france, open-canopy, pack."
_HELP_DATA = "Folder of the benchmark's files; `canopy data get` fills it."
_PANEL = "Benchmarks"
_HELP_BLOCK = "Side of the blocks resampled for intervals, m. Default: up to 250 m, so that 25 are left."

Map = Annotated[str | None, typer.Argument(metavar="MAP.tif", help=_HELP_MAP)]
Reference = Annotated[list[str] | None, typer.Option("--reference", help=_HELP_REFERENCE)]
Kind = Annotated[
    str | None, typer.Option("--kind", metavar="chm|gedi|plots", help="Default: told from the file.")
]
By = Annotated[list[str] | None, typer.Option("--by", metavar="WAY,WAY", help=_HELP_BY)]
Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")]
Stat = Annotated[str | None, typer.Option("--stat", metavar="mean|max|p95", help=_HELP_STAT)]
FloorM = Annotated[float | None, typer.Option("--floor-m", help=_HELP_FLOOR)]
Sensor = Annotated[
    str | None, typer.Option("--sensor", help="The floor by NEON's lidar: gemini, riegl or galaxy.")
]
Column = Annotated[str | None, typer.Option("--column", help="Heights of a table, e.g. rh_98.")]
RadiusM = Annotated[
    float | None, typer.Option("--radius-m", help="Of plots that are points. Default 10; GEDI 12.5.")
]
Slope = Annotated[Path | None, typer.Option("--slope", help="Raster of slope in degrees.")]
Dem = Annotated[Path | None, typer.Option("--dem", help="Elevation raster, for slope.")]
Shift = Annotated[bool, typer.Option("--shift/--no-shift", help="Measure the shift.")]
BlockM = Annotated[float | None, typer.Option("--block-m", help=_HELP_BLOCK)]
Replicates = Annotated[int, typer.Option("--replicates", help="Of the bootstrap; 0: no intervals.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the bootstrap.")]
Nodata = Annotated[float | None, typer.Option("--nodata", help="Missing in the map.")]
ReferenceNodata = Annotated[
    float | None, typer.Option("--reference-nodata", help="Missing in the reference.")
]
MapDate = Annotated[str | None, typer.Option("--map-date", help="2021, 2021-07 or 2021-07-04.")]
ReferenceDate = Annotated[str | None, typer.Option("--reference-date", help="Likewise.")]
Benchmark = Annotated[
    str | None, typer.Option("--benchmark", metavar="NAME", help=_HELP_BENCHMARK, rich_help_panel=_PANEL)
]
Model = Annotated[
    list[str] | None,
    typer.Option("--model", help="Name or file; may be repeated. Default: default.", rich_help_panel=_PANEL),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help=_HELP_DATA, rich_help_panel=_PANEL)
]
Group = Annotated[
    list[str] | None,
    typer.Option("--group", help="Only this group of the benchmark; repeat.", rich_help_panel=_PANEL),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.", rich_help_panel=_PANEL)]
Backend = Annotated[str, typer.Option("--backend", help=HELP_BACKEND, rich_help_panel=_PANEL)]
Precision = Annotated[str, typer.Option("--precision", help=HELP_PRECISION, rich_help_panel=_PANEL)]
