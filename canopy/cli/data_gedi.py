"""`canopy data gedi`: parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from canopy.cli.area import AreaOptions
from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json
from canopy.cli.groups import takes_groups

if TYPE_CHECKING:
    from canopy.sources.gedi import Granule, ShotsReport

_HELP_FILTER = (
    "strict: quality_flag 1, degrade_flag 0, sensitivity above 0.95 (0.98 in the tropics), little water, not "
    "urban. loose: sensitivity at least 0.5, a2 above 0.7, ground within 150 m of the elevation model. none."
)


@takes_groups
def gedi(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.h5...", help="GEDI L2A granules.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="SHOTS.parquet", help="GeoParquet to write.")],
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and say what there is to read; stop there.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The good shots of GEDI L2A granules (version 2 or 3) in an area, as one GeoParquet table.

    A shot is the statistic of a 25 m disc located to about 10 m: compare it with discs, not with pixels.

    Examples:

      canopy data gedi GEDI02_A_*.h5 --bbox 38.03,-84.49 --size-m 20000 -o shots.parquet

      canopy data gedi a.h5 --bounds -84.6,37.9,-84.4,38.1 --filter loose --rh 50,98 --l4a b.h5 -o s.parquet
    """
    from canopy.runtime import log, progress_bar, setup_logging
    from canopy.sources.gedi import check_rh, extract_shots, survey
    from canopy.sources.gedi_filters import filter_named
    from canopy.sources.gedi_table import check_out

    setup_logging(quiet, verbose)
    area = place.choose()
    percents = check_rh(_numbers(rh))
    filter_named(filter_)
    check_out(out, overwrite)
    where = area.describe() if area else "all of the granules"
    if dry_run:
        _print_plan(survey(files, filter_), where, json)
        return
    log.info(f"{where}; {_count(files)}, filter {filter_}")
    with progress_bar(quiet or json) as progress:
        report = extract_shots(
            files,
            out,
            area=area,
            rh=percents,
            filter=filter_,
            l2b=l2b or (),
            l4a=l4a or (),
            overwrite=overwrite,
            progress=progress,
        )
    for note in report.notes:
        log.warning(f"note: {note}")
    _print_report(report, json, quiet)


def _numbers(text: str) -> list[int]:
    """ "95,98" -> [95, 98]. Raises InputError."""
    from canopy.errors import InputError

    try:
        return [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise InputError(
            f"{text!r} is not a list of whole numbers", where="--rh", expected="e.g. 95,98"
        ) from error


def _count(granules: Sequence[object]) -> str:
    return f"{len(granules)} granule{'s' * (len(granules) != 1)}"


def _print_plan(granules: list[Granule], where: str, json: bool) -> None:
    total = sum(granule.shots for granule in granules)
    if json:
        found = [
            {"file": str(g.path), "version": g.version, "shots": g.shots, "beams": g.beams} for g in granules
        ]
        print_json({"dry_run": True, "area": where, "granules": found, "shots": {"in_files": total}})
        return
    typer.echo(f"{where}; {_count(granules)}, {total} shots to look at")
    for granule in granules:
        typer.echo(
            f"{granule.path}: version {granule.version}, {len(granule.beams)} beams, {granule.shots} shots"
        )


def _print_report(report: ShotsReport, json: bool, quiet: bool) -> None:
    if json:
        print_json(report.to_dict())
    elif not quiet:
        tally = report.tally
        typer.echo(f"{report.out}: {tally.kept} of {tally.read} shots; {tally}")
