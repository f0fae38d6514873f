"""`canopy predict`: parse, call, print."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import typer

from canopy.cli.area import Aoi, Bbox, Bounds, BoundsCrs, SizeM
from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json
from canopy.cli.predict_options import (
    Bands,
    BatchSize,
    Crs,
    DateBand,
    Datetime,
    Device,
    DryRun,
    Encoding,
    Gsd,
    Imagery,
    Images,
    InputCrs,
    Interval,
    MaxPixels,
    Model,
    Nodata,
    Out,
    Precision,
    QualityBand,
    Quicklook,
    Radiometry,
    Scale,
    Workers,
)

if TYPE_CHECKING:
    from canopy.inference.job import Job, Result


def predict(
    context: typer.Context,
    images: Images = None,
    bbox: Bbox = None,
    size_m: SizeM = None,
    bounds: Bounds = None,
    bounds_crs: BoundsCrs = "EPSG:4326",
    aoi: Aoi = None,
    imagery: Imagery = None,
    model: Model = "default",
    out: Out = None,
    gsd: Gsd = None,
    crs: Crs = None,
    input_crs: InputCrs = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = "auto",
    workers: Workers = 2,
    datetime: Datetime = None,
    bands: Bands = None,
    nodata: Nodata = None,
    scale: Scale = None,
    encoding: Encoding = "float32",
    date_band: DateBand = False,
    interval: Interval = None,
    quality_band: QualityBand = False,
    quicklook: Quicklook = False,
    radiometry: Radiometry = "none",
    max_pixels: MaxPixels = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
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
    from canopy.geo.choose import choose_area
    from canopy.inference.estimate import MAX_PIXELS
    from canopy.inference.job import prepare
    from canopy.inference.output import default_out
    from canopy.inference.request import Options, Request
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet=quiet, verbose=verbose)
    # What goes to the job as it was typed has the job's own names.
    given = {name: context.params[name] for name in Options.__annotations__}
    given["max_pixels"] = MAX_PIXELS if max_pixels is None else max_pixels
    request = Request(
        images=tuple(images or ()),
        imagery=imagery,
        area=choose_area(bbox=bbox, size_m=size_m, bounds=bounds, bounds_crs=bounds_crs, aoi=aoi),
        model=model,
        out=out if out is not None else default_out(images or [], imagery),
        **cast(Options, given),
    )
    job = prepare(request)
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


def _announce(job: Job) -> None:
    """What is about to be done, before it is done."""
    from canopy.runtime import log

    for line in job.describe():
        log.info(line)
    for note in job.notes:
        log.warning(f"note: {note}")


def _print_plan(job: Job, json: bool) -> None:
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
