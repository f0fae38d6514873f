"""`canopy predict`: parse, call, print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from canopy.cli.area import Aoi, Bbox, Bounds, BoundsCrs, SizeM
from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json

if TYPE_CHECKING:
    from canopy.inference.job import Job, Result

_HELP_OUT = "GeoTIFF to write; OUT.json (a STAC item) lies beside it. Default: IMAGE_chm.tif here."
_HELP_CRS = "CRS of the map, or `image` for the image's own grid. Default: the area's UTM zone."
_HELP_RADIOMETRY = (
    "Move the image's colours onto those of the model's training imagery: none; match; or the target's own "
    "r5,r95,g5,g95,b5,b95 in 0..1. The image's percentiles are measured once over all of it."
)
_HELP_IMAGERY = (
    "A named source (naip, demo, ...), a STAC API or catalog, an XYZ template, a directory or VRT."
)


def predict(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="RGB images; several are mosaicked.")
    ] = None,
    bbox: Bbox = None,
    size_m: SizeM = None,
    bounds: Bounds = None,
    bounds_crs: BoundsCrs = "EPSG:4326",
    aoi: Aoi = None,
    imagery: Annotated[str | None, typer.Option("--imagery", metavar="NAME", help=_HELP_IMAGERY)] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME|FILE", help="See canopy models list.")
    ] = "default",
    out: Annotated[str | None, typer.Option("-o", "--out", metavar="OUT.tif", help=_HELP_OUT)] = None,
    gsd: Annotated[
        float | None, typer.Option("--gsd", help="Ground metres per pixel of the map. Default: the model's.")
    ] = None,
    crs: Annotated[str | None, typer.Option("--crs", help=_HELP_CRS)] = None,
    input_crs: Annotated[
        str | None, typer.Option("--input-crs", help="CRS of images that carry none. Default: --crs.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="auto (fp32), fp32 or bf16.")] = "auto",
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Crops per forward pass, or auto.")
    ] = "auto",
    workers: Annotated[int, typer.Option("--workers", help="Threads that read imagery ahead.")] = 2,
    datetime: Annotated[
        str | None, typer.Option("--datetime", metavar="FROM/TO", help="Acquisitions to use, as STAC has it.")
    ] = None,
    bands: Annotated[
        str | None, typer.Option("--bands", metavar="R,G,B", help="Band numbers of red, green, blue, from 1.")
    ] = None,
    nodata: Annotated[float | None, typer.Option("--nodata", help="Image value that means missing.")] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Image value that means white; needed unless uint8.")
    ] = None,
    encoding: Annotated[str, typer.Option("--encoding", help="float32, uint16cm or uint8m.")] = "float32",
    date_band: Annotated[
        bool, typer.Option("--date-band", help="Add band acquisition_date: days since 1970-01-01, 0 unknown.")
    ] = False,
    quicklook: Annotated[bool, typer.Option("--quicklook", help="Draw OUT.png beside the map.")] = False,
    radiometry: Annotated[
        str, typer.Option("--radiometry", metavar="none|match|PERCENTILES", help=_HELP_RADIOMETRY)
    ] = "none",
    max_pixels: Annotated[
        int | None, typer.Option("--max-pixels", help="Refuse maps larger than this.", show_default="4e9")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and say what would be done; stop there.")
    ] = False,
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

      canopy predict a.tif b.tif --aoi stand.gpkg --crs image --gsd 1 --dry-run
    """
    from canopy.geo.choose import choose_area
    from canopy.inference.estimate import MAX_PIXELS
    from canopy.inference.job import prepare
    from canopy.inference.output import default_out
    from canopy.inference.request import Request
    from canopy.runtime import log, progress_bar, setup_logging

    setup_logging(quiet=quiet, verbose=verbose)
    request = Request(
        images=tuple(images or ()),
        imagery=imagery,
        area=choose_area(bbox=bbox, size_m=size_m, bounds=bounds, bounds_crs=bounds_crs, aoi=aoi),
        model=model,
        out=out if out is not None else default_out(images or [], imagery),
        gsd=gsd,
        crs=crs,
        input_crs=input_crs,
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        datetime=datetime,
        bands=bands,
        nodata=nodata,
        scale=scale,
        encoding=encoding,
        date_band=date_band,
        quicklook=quicklook,
        radiometry=radiometry,
        overwrite=overwrite,
        max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
    )
    job = prepare(request)
    for line in job.describe():
        log.info(line)
    for note in job.notes:
        log.warning(f"note: {note}")
    if dry_run:
        _print_plan(job, json)
        return
    with progress_bar(quiet) as progress:
        result = job.run(progress)
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _print_result(result)


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
