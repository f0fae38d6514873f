"""`canopy data chm`: parse, call, print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from canopy.cli.area import AreaOptions
from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json, refuse_given
from canopy.cli.groups import takes_groups

_POLICY = "zero: 0 m of canopy; mask: nodata; keep: as canopy."
_HELP_CRS = "CRS of the CHM, in metres; also of files that carry none. Default: the points' own, or UTM."
_HELP_GROUND = "auto, class (LAS class 2) or csf (cloth simulation)."
_HELP_UNITS = "Unit of elevations: auto (as the file says, else that of x and y), m, ft or us-ft."

_OF_POINTS = (
    "ground", "buildings", "water", "bridges", "wires", "pit_width_m", "fill_px", "workers",
)  # fmt: skip


@takes_groups
def chm(
    context: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="CHM.tif", help="GeoTIFF to write.")],
    place: AreaOptions,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[LIDAR]...", help="LAS, LAZ or COPC files.")
    ] = None,
    dsm: Annotated[Path | None, typer.Option("--dsm", help="Surface raster, instead of points.")] = None,
    dtm: Annotated[Path | None, typer.Option("--dtm", help="Terrain raster to subtract from it.")] = None,
    gsd: Annotated[float, typer.Option("--gsd", help="Ground metres per pixel.")] = 1.0,
    crs: Annotated[str | None, typer.Option("--crs", help=_HELP_CRS)] = None,
    input_crs: Annotated[
        str | None, typer.Option("--input-crs", help="CRS of files that carry none. Default: --crs.")
    ] = None,
    ground: Annotated[str, typer.Option("--ground", help=_HELP_GROUND)] = "auto",
    buildings: Annotated[str, typer.Option("--buildings", help=f"Class 6. {_POLICY}")] = "zero",
    water: Annotated[str, typer.Option("--water", help=f"Class 9. {_POLICY}")] = "zero",
    bridges: Annotated[str, typer.Option("--bridges", help=f"Class 17. {_POLICY}")] = "zero",
    wires: Annotated[str, typer.Option("--wires", help=f"Classes 13-16. {_POLICY}")] = "zero",
    units: Annotated[str, typer.Option("--units", help=_HELP_UNITS)] = "auto",
    pit_width_m: Annotated[
        float, typer.Option("--pit-width-m", help="Close holes in crowns up to this wide; 0 keeps them.")
    ] = 1.0,
    fill_px: Annotated[
        int, typer.Option("--fill-px", help="Interpolate pixels without returns this near to others.")
    ] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes.", show_default="up to 4")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Canopy height from lidar: point clouds, or a surface and a terrain raster.

    Writes a GeoTIFF with bands canopy_height (metres; nodata where there were no returns), point_density
    (returns per square metre) and valid (1 or 0).

    Examples:

      canopy data chm tile1.laz tile2.laz -o chm.tif

      canopy data chm forest.copc.laz -o chm.tif --gsd 0.5 --aoi stand.gpkg --buildings mask

      canopy data chm --dsm dsm.tif --dtm dtm.tif -o chm.tif
    """
    from canopy.errors import InputError
    from canopy.runtime import progress_bar, setup_logging
    from canopy.sources.lidar import ChmOptions, chm_from_points
    from canopy.sources.lidar_rasters import chm_from_rasters
    from canopy.sources.lidar_surface import Policy

    setup_logging(quiet, verbose)
    options = ChmOptions(
        gsd=gsd, crs=crs, input_crs=input_crs, ground=ground,
        policy=Policy(buildings=buildings, water=water, bridges=bridges, wires=wires), units=units,
        pit_width_m=pit_width_m, fill_px=fill_px, workers=workers if workers is not None else _cores(),
        overwrite=overwrite,
    )  # fmt: skip
    if (dsm is None) != (dtm is None):
        raise InputError("one raster of two", where="--dsm, --dtm", expected="both of them")
    if dsm is not None and files:
        raise InputError("point clouds and rasters together", where="--dsm", expected="one or the other")
    if dsm is not None:
        refuse_given(
            context, *_OF_POINTS, where="--dsm", because="two rasters have no points, classes or returns"
        )
    area = place.choose()
    with progress_bar(quiet or json_) as progress:
        if dsm is not None and dtm is not None:
            facts = chm_from_rasters(dsm, dtm, out, options, area=area, progress=progress)
        else:
            facts = chm_from_points(files or [], out, options, area=area, progress=progress)
    _print(facts, json_, quiet)


def _cores() -> int:
    return min(4, os.cpu_count() or 1)


def _print(facts: dict[str, Any], json_: bool, quiet: bool) -> None:
    if json_:
        print_json(facts)
        return
    if quiet:
        return
    typer.echo(
        f"{facts['file']}: {facts['width_px']} x {facts['height_px']} px of {facts['gsd_m']:.3g} m, "
        f"{facts['crs']}, "
        f"mean height {facts['mean_height_m']:.1f} m, {facts['cover_2m']:.0%} above 2 m, "
        f"{facts['valid_fraction']:.1%} valid"
    )
    if "points_read" in facts:
        typer.echo(
            f"{facts['points_read']} points ({facts['points_noise']} noise), "
            f"{facts['points_per_m2']:.1f} per m2, ground from {facts['ground']}"
        )
