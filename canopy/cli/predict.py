"""`canopy predict`: parse, call, print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from canopy.cli.options import DryRun, Json, Quiet, Verbose, print_json, takes_groups
from canopy.inference.options import OneMapOptions

if TYPE_CHECKING:
    from canopy.inference.predict import Prediction, Result


@takes_groups
def predict(
    options: OneMapOptions,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Map canopy height in metres from RGB imagery.

    The area is that of the images, or --bbox, --bounds or --aoi. Without images and --imagery, the best named
    source that covers the area is used.

    Examples:

      canopy predict aerial.tif -o chm.tif --quicklook

      canopy predict --imagery naip --bbox 44.083,-71.296 --size-m 1000 -o chm.tif

      canopy predict aerial.tif --interval 0.9 --quality-band -o chm.tif

      canopy predict a.tif b.tif --aoi stand.gpkg --crs image --gsd 1 --dry-run
    """
    from canopy.inference.output import default_out
    from canopy.inference.predict import prepare
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet=quiet, verbose=verbose)
    if options.out is None:
        options = options.model_copy(update={"out": default_out(options.images, options.imagery)})
    job = prepare(options, dry_run=dry_run)
    _announce(job)
    if dry_run:
        _print_plan(job, json)
        return
    with progress_bar(quiet) as progress:
        result = job.run(progress)
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _print_result(result)


def _announce(job: Prediction) -> None:
    """What is about to be done, before it is done."""
    from canopy.runtime import log

    for line in job.describe():
        log.info(line)
    for note in job.notes:
        log.warning(f"note: {note}")


def _print_plan(job: Prediction, json: bool) -> None:
    if json:
        print_json({"dry_run": True, **job.to_dict(), "notes": job.notes})


def _print_result(result: Result) -> None:
    if result.files is None:
        return
    grid, summary = result.job.target.output, result.summary
    heights = "no valid pixel"
    if summary.valid_pixels:
        heights = (
            f"mean height {summary.mean_height_m:.1f} m, {100 * summary.cover_2m:.0f} % above 2 m, "
            f"{100 * summary.valid_fraction:.1f} % valid"
        )
    typer.echo(f"{result.files.tif}: {grid.width} x {grid.height} px, {heights}, {summary.seconds:.0f} s")
    if result.files.quicklook:
        typer.echo(f"{result.files.quicklook}: its picture")
