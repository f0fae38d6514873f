"""`canopy data chm | gedi | chips`: heights from lidar of the air and of space, and chips to train on.

Parse, call, print.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from canopy.chips.options import CutOptions, SplitOptions
from canopy.cli.options import (
    DryRun,
    Json,
    Overwrite,
    Quiet,
    Verbose,
    print_json,
    refuse_given,
    takes_groups,
)
from canopy.errors import InputError
from canopy.files import check_output
from canopy.inference.options import AreaOptions
from canopy.labels.chm import ChmOptions, chm_from_rasters
from canopy.runtime import log, progress_bar, setup_logging

_OF_POINTS = ("ground", "buildings", "water", "bridges", "wires", "pit_width_m", "fill_px", "workers")
_OF_PAIRS = {*CutOptions.model_fields, *SplitOptions.model_fields, "limit", "workers"} - {"size_px", "seed"}
_OF_CHIPS = ("index.csv", "index.parquet", "summary.json", "contact_sheet.png")
_FIRST_SEED = 1000  # far from 0, the demo's
_HELP_FILTER = (
    "strict: quality_flag 1, degrade_flag 0, sensitivity above 0.95 (0.98 in the tropics), little water, not "
    "urban, and all of loose. loose: sensitivity at least 0.5, a2 above 0.7, ground within 150 m of the "
    "elevation model. none."
)


@takes_groups
def chm(
    context: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="CHM.tif", help="GeoTIFF to write.")],
    options: ChmOptions,
    place: AreaOptions,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[LIDAR]...", help="LAS, LAZ or COPC files.")
    ] = None,
    dsm: Annotated[Path | None, typer.Option("--dsm", help="Surface raster, instead of points.")] = None,
    dtm: Annotated[Path | None, typer.Option("--dtm", help="Terrain raster to subtract from it.")] = None,
    dry_run: DryRun = False,
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
    setup_logging(quiet, verbose)
    if (dsm is None) != (dtm is None):
        raise InputError("one raster of two", where="--dsm, --dtm", expected="both of them")
    if dsm is not None and files:
        raise InputError("point clouds and rasters together", where="--dsm", expected="one or the other")
    if dsm is not None:
        refuse_given(
            context, *_OF_POINTS, where="--dsm", because="two rasters have no points, classes or returns"
        )
    check_output(out, [files, dsm, dtm, place.inputs], overwrite=options.overwrite)
    area = place.area()
    with progress_bar(quiet or json_) as progress:
        if dsm is not None and dtm is not None:
            facts = chm_from_rasters(dsm, dtm, out, options, area=area, progress=progress, dry_run=dry_run)
        else:
            from canopy.labels.lidar import chm_from_points

            facts = chm_from_points(files or [], out, options, area=area, progress=progress, dry_run=dry_run)
    if json_:
        print_json({"dry_run": True, **facts} if dry_run else facts)
    elif not quiet:
        _print_map(facts)


def _print_map(facts: dict[str, Any]) -> None:
    size = f"{facts['width_px']} x {facts['height_px']} px of {facts['gsd_m']:.3g} m, {facts['crs']}"
    if "mean_height_m" not in facts:
        typer.echo(f"{facts['file']} would have {size}")
        return
    typer.echo(
        f"{facts['file']}: {size}, mean height {facts['mean_height_m']:.1f} m, "
        f"{facts['cover_2m']:.0%} above 2 m, {facts['valid_fraction']:.1%} valid"
    )
    if "points_read" in facts:
        typer.echo(
            f"{facts['points_read']} points ({facts['points_noise']} noise), "
            f"{facts['points_per_m2']:.1f} per m2, ground from {facts['ground']}"
        )


@takes_groups
def gedi(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.h5...", help="GEDI L2A granules.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="SHOTS.parquet", help="GeoParquet, or .gpkg.")],
    place: AreaOptions,
    rh: Annotated[
        str, typer.Option("--rh", metavar="NN,NN", help="Relative heights to keep, 0 to 100.")
    ] = "95,98",
    filter_: Annotated[
        str, typer.Option("--filter", metavar="strict|loose|none", help=_HELP_FILTER)
    ] = "strict",
    l2b: Annotated[
        list[Path] | None,
        typer.Option("--l2b", metavar="FILE", help="L2B granule for cover and pai; may be repeated."),
    ] = None,
    l4a: Annotated[
        list[Path] | None,
        typer.Option("--l4a", metavar="FILE", help="L4A granule for biomass (agbd); may be repeated."),
    ] = None,
    quicklook: Annotated[
        bool, typer.Option("--quicklook", help="Draw SHOTS.png: a map of the shots, a histogram of heights.")
    ] = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The good shots of GEDI L2A granules (version 2 or 3) in an area, as one GeoParquet or GeoPackage table.

    A shot is the statistic of a 25 m disc located to about 10 m: compare it with discs, not with pixels.

    Examples:

      canopy data gedi GEDI02_A_*.h5 --bbox 38.03,-84.49 --size-m 20000 -o shots.parquet

      canopy data gedi a.h5 --bounds -84.6,37.9,-84.4,38.1 --filter loose --rh 50,98 --l4a b.h5 -o s.parquet
    """
    from canopy.labels.gedi import check_rh, extract_shots, survey
    from canopy.labels.shots import SUFFIXES

    setup_logging(quiet, verbose)
    check_rh(rh)
    inputs = [*files, *(l2b or ()), *(l4a or ()), *place.inputs]
    check_output(out, inputs, overwrite=overwrite, suffixes=SUFFIXES)
    area = place.area()
    where = area.describe() if area else "all of the granules"
    count = f"{len(files)} granule{'s' * (len(files) != 1)}"
    if dry_run:
        granules = survey(files, filter_)
        total = sum(granule["shots"] for granule in granules)
        if json:
            shots = {"in_files": total}
            print_json({"dry_run": True, "area": where, "granules": granules, "shots": shots})
            return
        typer.echo(f"{where}; {count}, {total} shots to look at")
        for found in granules:
            beams = f"{len(found['beams'])} beams, {found['shots']} shots"
            typer.echo(f"{found['file']}: version {found['version']}, {beams}")
        return
    log.info(f"{where}; {count}, filter {filter_}")
    with progress_bar(quiet or json) as progress:
        facts = extract_shots(
            files, out, area=area, rh=rh, filter=filter_, l2b=l2b or (), l4a=l4a or (), quicklook=quicklook,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if json:
        print_json(facts)
    elif not quiet:
        typer.echo(f"{out}: {facts['shots']['kept']} of {facts['shots']['read']} shots; {facts['summary']}")


@takes_groups
def chips(
    context: typer.Context,
    out_dir: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the chips.")],
    cut: CutOptions,
    split: SplitOptions,
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", metavar="FILE", help="CSV or Parquet table of pairs, see below."),
    ] = None,
    synth: Annotated[
        int | None,
        typer.Option("--synth", metavar="N", help="Instead: N chips of the procedural forest, for training."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows of the manifest.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 1,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Cut pairs of image and canopy height into training chips.

    The manifest has columns rgb_path, chm_path (paths count from its folder) and, if known, id, site, kind,
    split, crs, date_rgb, date_chm (or year_...), sensor or floor_m, gedi_path, licence. Rows without chm_path
    become chips without heights, for canopy pretrain. Given splits are kept; the rest is split by
    blocks of ground. DIR gets shards/, index.csv and .parquet, summary.json and
    contact_sheet.png. Run it again to go on after an interruption or with a longer manifest: nothing is cut
    twice. Exit code 3 when some files could not be read (index.csv says which).

    With --synth there is no manifest; canopy train mixes such chips in by data.chips=[chips,synth].

    Example: canopy data chips --manifest pairs/manifest.csv -o chips --hold-out 'WLOU*' --workers 4
    """
    from canopy.chips.write import table, write_chips, write_synth

    if (manifest is None) == (synth is None):
        raise InputError("needs either --manifest or --synth")
    setup_logging(quiet, verbose)
    if out_dir.is_dir():  # it may be gone on with, but not over its own manifest
        check_output([out_dir / name for name in _OF_CHIPS], [manifest], overwrite=True)
    with progress_bar(quiet or json_) as progress:
        if manifest is None:
            refuse_given(
                context, *_OF_PAIRS, where="--synth", because="synthetic chips are drawn, not cut or split"
            )
            seed = _FIRST_SEED + split.seed
            summary = write_synth(
                out_dir, synth or 0, cut.size_px, seed, overwrite=overwrite, progress=progress
            )
            told = f"{synth} synthetic chips, {'made' if summary['cut_now'] else 'there already'}"
        else:
            summary = write_chips(
                manifest, out_dir, cut, split, limit=limit, workers=workers, overwrite=overwrite,
                progress=progress,
            )  # fmt: skip
            told = f"{table(summary)}\n{summary['cut_now']} of {summary['shards']} shards cut now"
    if json_:
        print_json(summary)
    elif not quiet:
        typer.echo(f"{out_dir}: {told}")
    if summary.get("unreadable"):
        typer.echo(f"canopy: {summary['unreadable']} chips could not be read; see index.csv", err=True)
        raise typer.Exit(3)
