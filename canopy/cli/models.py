"""`canopy models`: what models there are, what is in a file, and how others become one."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.options import Json, Overwrite, Quiet, Verbose, print_json
from canopy.files import check_output
from canopy.runtime import progress_bar, setup_logging

app = typer.Typer(no_args_is_help=True)


@app.command("convert")
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
    from canopy.models.published import convert as convert_file

    setup_logging(quiet=quiet, verbose=verbose)
    check_output(out, [checkpoint, backbone, config], overwrite=overwrite)
    source = None
    if checkpoint.startswith("hf://"):
        from canopy.models.registry import fetch_hub

        source, checkpoint = checkpoint, str(fetch_hub(checkpoint))
    done = convert_file(
        checkpoint, out, backbone=backbone, config=config, source=source, half=half, overwrite=overwrite
    )
    if json:
        print_json(done)
    elif not quiet:
        made = done["config"]
        typer.echo(f"found {done['found']}")
        typer.echo(f"licence {done['licence']}; {done['source']}")
        typer.echo(
            f"{made['gsd_m']} m pixels, crops of {made['crop_px']} px; images are padded to multiples of "
            f"{made['multiple_px']} px, because its decoder stretches odd token grids"
        )
        for reason, count in Counter(done["dropped"].values()).items():
            typer.echo(f"left out {count} tensors: {reason}")
        typer.echo(f"{done['output']}: {done['bytes'] / 1e6:.1f} MB, sha256 {done['sha256']}")


_HELP_OUT = (
    "File to write. Default: the cache, where --precision int8 finds it; beside MODEL it is found too."
)


@app.command("quantize")
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or .safetensors file.")],
    data: Annotated[Path, typer.Option("--data", help="A chips folder (canopy data chips).")],
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
    from canopy.models.registry import load_model

    setup_logging(quiet, verbose)
    if out is not None:
        check_output(out, [model, data], overwrite=overwrite)
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


class Target(StrEnum):
    """What to write a model for."""

    onnx = "onnx"
    deepness = "deepness"


@app.command("export")
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or .safetensors file.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.onnx", help="File to write.")],
    to: Annotated[
        Target, typer.Option("--to", help="onnx, or ONNX with what the QGIS plugin Deepness reads.")
    ] = Target.onnx,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model as ONNX, for other programs: RGB in 0..1 in, metres out, in crops of the model's size.

    Needs the extra `export`.

    Example: canopy models export default --to deepness -o canopy.onnx
    """
    from canopy.files import file_sha256, replacing
    from canopy.models.export import to_onnx
    from canopy.models.registry import load_model

    setup_logging(quiet, verbose)
    expected = "a file name ending in .onnx"
    (path,) = check_output(out, [model], overwrite=overwrite, expected=expected, suffixes=(".onnx",))
    loaded = load_model(model)
    made = to_onnx(loaded, deepness=to is Target.deepness)
    with replacing(path) as part:
        part.write_bytes(made)
    side, gsd_m = loaded.config.crop_px, loaded.config.gsd_m
    if json_:
        print_json(
            {
                "output": str(path),
                "bytes": len(made),
                "sha256": file_sha256(path),
                "crop_px": side,
                "gsd_m": gsd_m,
            }
        )
    elif not quiet:
        typer.echo(
            f"{path}: {len(made) / 1e6:.1f} MB; rgb (1, 3, {side}, {side}) in 0..1 at {gsd_m} m -> metres"
        )


@app.command("list")
def list_models(
    encoders: Annotated[
        bool, typer.Option("--encoders", help="Encoders that model.encoder.init of a training takes.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Models by the names that --model takes: embedded ones, and published ones that are downloaded.

    Example: canopy models list
    """
    if encoders:
        from canopy.models.pretrained import listed_encoders

        setup_logging(quiet, verbose)
        found = listed_encoders()
        if json_:
            print_json({"encoders": found})
            return
        for row in found:
            typer.echo(f"{row['name']:38} {row['licence']:15} {row['source']}")
        typer.echo("Any other plain ViT, DINOv2, DINOv3 or network with maps at 1/2 to 1/32 of timm's, too.")
        return
    from canopy.models.checkpoint import describe
    from canopy.models.registry import EMBEDDED, published_models, resolve_model

    setup_logging(quiet, verbose)
    rows = {name: describe(resolve_model(name)) for name in EMBEDDED}
    published = {name: entry.facts() for name, entry in published_models().items()}
    if json_:
        print_json({"models": rows, "published": published})
        return
    for name, facts in rows.items():
        card, line = facts["card"], f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['gsd_m']} m pixels"
        if pooled := card.get("val", {}).get("all"):
            line += f", val MAE {pooled['mae_m']:.2f} m, r {pooled['r']:.2f}"
        licence = card.get("licence", "licence not stated")
        typer.echo(f"{name:19} {facts['name']}: {line}; {licence}; embedded")
    for name, facts in published.items():
        typer.echo(
            f"{name:19} {facts['title']}: {facts['size_gb']:g} GB; {facts['licence']}; {facts['source']}"
        )
        typer.echo(f"{'':19} {facts['origin']}; {facts['how']}")


@app.command("info")
def info(
    name_or_file: Annotated[str, typer.Argument(metavar="NAME|FILE", help="An embedded name or a file.")],
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What a model expects, what it was trained on, how well it did, and whether commercial use is allowed.

    A published model is described from the table, without downloading it.

    Example: canopy models info default
    """
    from canopy.models.checkpoint import describe
    from canopy.models.registry import EMBEDDED, published_models, resolve_model
    from canopy.terms import use_of

    setup_logging(quiet, verbose)
    path, table = Path(name_or_file), {} if name_or_file in EMBEDDED else published_models()
    entry = None if path.exists() else table.get(name_or_file)
    facts = {"name": name_or_file, **entry.facts()} if entry else {}
    if not entry:
        # A file is described as it is; others may have to be found.
        facts = describe(path if path.is_file() else resolve_model(name_or_file))
        facts["commercial_use"] = use_of(facts["card"].get("licence", ""))
    if json_:
        print_json(facts)
        return
    if entry:
        for key, value in facts.items():
            if value and key not in ("name", "files", "hub", "terms_at"):
                typer.echo(f"{key:12} {value}")
        return
    card = facts["card"]
    lines = {
        "model": facts["name"],
        "file": f"{facts['path']} ({facts['bytes'] / 1e6:.1f} MB)",
        "sha256": facts["sha256"],
        "input": f"{', '.join(facts['bands'])} at {facts['gsd_m']} m, crops of {facts['crop_px']} px",
        "parameters": f"{facts['parameters'] / 1e6:.1f} M",
        "licence": card.get("licence", "not stated"),
        "commercial": facts["commercial_use"],
        "trained": f"{card.get('date', 'date not stated')}, {card.get('minutes', '?')} minutes",
    }
    if started := card.get("started_from"):
        told = (started.get(k) for k in ("name", "timm", "file", "licence", "source"))
        lines["began from"] = ", ".join(str(value) for value in told if value)
    for key, value in lines.items():
        typer.echo(f"{key:11} {value}")
    for split in ("val", "test"):
        scores = card.get(split) or {}
        if scores:
            typer.echo(f"{split} scores at 1 m (MAE, r, bias):")
        for site, row in scores.items():
            typer.echo(f"  {site:60.60} {row['mae_m']:6.2f} m  {row['r'] or 0:5.2f}  {row['bias_m']:+6.2f} m")
