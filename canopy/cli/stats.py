"""`canopy stats`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json


def stats(
    height_map: Annotated[
        str, typer.Argument(metavar="MAP.tif", help="Height map: a GeoTIFF, VRT, or folder of tiles.")
    ],
    zones: Annotated[
        Path, typer.Option("--zones", metavar="POLYGONS", help="Polygons: any vector file, any CRS.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="TABLE", help="stats.parquet (with the polygons) or .csv.")
    ],
    percentiles: Annotated[
        str, typer.Option("--percentiles", metavar="LIST", help="Of height, 0 to 100.")
    ] = "5,25,50,75,95",
    above: Annotated[
        str, typer.Option("--above", metavar="LIST", help="Cover is the share of ground higher, metres.")
    ] = "2,5,10",
    nodata: Annotated[float | None, typer.Option("--nodata", help="Map value that means missing.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Mean height, percentiles, canopy cover and area per polygon.

    Pixels count by the ground they share with the polygon, so small and crooked polygons are exact. Polygons
    outside the map stay in the table with n = 0.

    Example: canopy stats chm.tif --zones stands.gpkg -o stats.parquet
    """
    from canopy.evaluation.zones import ZoneOptions, zone_stats
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    options = ZoneOptions(
        _numbers(percentiles, "--percentiles"), _numbers(above, "--above"), nodata, overwrite
    )
    with progress_bar(quiet or json_) as progress:
        table = zone_stats(height_map, zones, out, options, progress=progress)
    empty = int((table["n"] == 0).sum())
    valid_ha = float(table["valid_ha"].sum())
    mean = float((table["mean_m"] * table["valid_ha"]).sum() / valid_ha) if valid_ha else None
    facts = {
        "file": str(out), "zones": len(table), "without_pixels": empty, "valid_ha": valid_ha, "mean_m": mean,
    }  # fmt: skip
    if json_:
        print_json(facts)
    elif not quiet:
        heights = "" if mean is None else f", mean height {mean:.1f} m"
        outside = f", {empty} without valid pixels" if empty else ""
        typer.echo(f"{out}: {len(table)} polygons{outside}, {valid_ha:,.1f} ha{heights}")


def _numbers(text: str, where: str) -> tuple[float, ...]:
    """Numbers of a comma-separated list."""
    from canopy.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"cannot read {text!r}", where=where, expected="numbers, such as 2,5,10") from None
