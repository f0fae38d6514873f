"""`canopy models convert`: a published checkpoint becomes a canopy model file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json

if TYPE_CHECKING:
    from canopy.models.published import Converted


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A file, a hub directory, or hf://owner/name[@revision]."),
    ],
    out: Annotated[str, typer.Option("-o", "--out", metavar="MODEL.safetensors", help="File to write.")],
    backbone: Annotated[
        str | None, typer.Option("--backbone", metavar="FILE", help="The other file of an original v2 model.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE.json", help="num_heads, taps, ... of a size never published."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store matrices as fp16: half the size.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a published v1 or v2 checkpoint, recognised by its content; every tensor is accounted for.

    Examples:

      canopy models convert SSLhuge_satellite.pth -o v1-huge.safetensors

      canopy models convert chmv2_dpt_head.pth --backbone dinov3_vitl16_sat493m.pth -o v2.safetensors

      canopy models convert hf://facebook/dinov3-vitl16-chmv2-dpt-head -o v2.safetensors
    """
    from pathlib import Path

    from canopy.errors import InputError
    from canopy.models.published import convert as convert_file
    from canopy.runtime import setup_logging

    setup_logging(quiet=quiet, verbose=verbose)
    if Path(out).expanduser().exists() and not overwrite:
        raise InputError(
            "exists already", where=out, remedy="add --overwrite, or choose another name with -o"
        )
    source = None
    if checkpoint.startswith("hf://"):
        from canopy.sources.weights import fetch_hub

        source, checkpoint = checkpoint, str(fetch_hub(checkpoint))
    done = convert_file(
        checkpoint, out, backbone=backbone, config=config, source=source, half=half, overwrite=overwrite
    )
    if json:
        print_json(done.to_dict())
    elif not quiet:
        _print(done)


def _print(done: Converted) -> None:
    config = done.recognised.config
    typer.echo(f"found {done.recognised.found}")
    typer.echo(f"licence {done.card['licence']}; {done.card['source']}")
    typer.echo(
        f"{config.gsd_m} m pixels, crops of {config.crop_px} px; images are padded to multiples of "
        f"{config.pad_px} px, because its decoder stretches odd token grids"
    )
    for reason, count in done.card["dropped"].items():
        typer.echo(f"left out {count} tensors: {reason}")
    typer.echo(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB, sha256 {done.sha256}")
