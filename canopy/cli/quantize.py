"""`canopy models quantize`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json

_HELP_OUT = (
    "File to write. Default: the cache, where --precision int8 finds it; beside MODEL it is found too."
)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or .safetensors file.")],
    data: Annotated[
        Path, typer.Option("--data", help="A data pack, a chips folder (canopy data chips) or a chips file.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="MODEL.int8.zip", help=_HELP_OUT)] = None,
    crops: Annotated[
        int | None, typer.Option("--crops", min=8, help="Crops to calibrate on. Default: by their size.")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make the int8 network of a model, for --precision int8.

    It is calibrated on crops of the training chips; the val chips' lidar says what it costs. Needs the
    extra `export`.

    Example: canopy models quantize default --data chips
    """
    from canopy.calibration.quantize import quantize as make
    from canopy.runtime import progress_bar, setup_logging
    from canopy.sources.weights import load_model

    setup_logging(quiet, verbose)
    with progress_bar(quiet or json_) as progress:
        report = make(load_model(model), data, out, crops=crops, overwrite=overwrite, progress=progress)
    if json_:
        print_json(report)
    elif not quiet:
        found = report["accuracy"]
        typer.echo(
            f"{report['output']}: MAE {found['int8']['mae_m']:.3f} m against lidar, fp32 "
            f"{found['fp32']['mae_m']:.3f} m; {found['mean_difference_m']:.3f} m apart on average "
            f"({found['chips']} val chips)"
        )
