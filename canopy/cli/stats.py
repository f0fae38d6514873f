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
    interval: Annotated[
        float | None,
        typer.Option("--interval", metavar="0.9", help="Add mean_lower_m, mean_upper_m of this coverage."),
    ] = None,
    nodata: Annotated[float | None, typer.Option("--nodata", help="Map value that means missing.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Mean height, percentiles, canopy cover and area per polygon.

    Pixels count by the ground they share with the polygon, so small and crooked polygons are exact. Polygons
    outside the map stay in the table with n = 0. Intervals need a map of canopy predict --interval 0.9; they
    take into account that neighbouring errors are alike (docs/uncertainty.md).

    Example: canopy stats chm.tif --zones stands.gpkg -o stats.parquet
    """
    from canopy.evaluation.zones import ZoneOptions, check_out, write_table, zone_stats
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    options = ZoneOptions(
        _numbers(percentiles, "--percentiles"), _numbers(above, "--above"), nodata, overwrite
    )
    with progress_bar(quiet or json_) as progress:
        if interval is None:
            table = zone_stats(height_map, zones, out, options, progress=progress)
        else:
            from canopy.calibration.zone_intervals import zone_intervals

            target = check_out(out, overwrite)
            bands = zone_intervals(height_map, zones, interval, progress=progress)
            table = zone_stats(height_map, zones, None, options, progress=progress).join(bands)
            write_table(table, target)
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
