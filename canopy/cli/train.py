"""`canopy train`: parse, call, print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.common import Json, Quiet, Verbose, print_json


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What differs from the defaults.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override: steps=500 data.chips=DIR.")
    ] = None,
    run_dir: Annotated[
        Path, typer.Option("-o", "--out", metavar="RUN_DIR", help="Folder of the run.")
    ] = Path("run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from RUN_DIR/last.ckpt, exactly where it was.")
    ] = False,
    fast_dev_run: Annotated[
        bool,
        typer.Option("--fast-dev-run", help="Two steps and an export in a temporary folder, as a check."),
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a height model on the chips of `canopy data chips`.

    RUN_DIR gets config.yaml (all settings), train.csv, val.csv, tensorboard/, last.ckpt and, at the end,
    model.safetensors, which every --model takes. One line is said per validation. An interrupted run goes on
    with --resume; a finished one goes on when steps or minutes are raised.

    Example: canopy train configs/finetune/small.yaml data.chips=chips minutes=30 -o runs/first
    """
    from canopy.config import load_settings
    from canopy.runtime import progress_bar, setup_logging
    from canopy.training.settings import FinetuneSettings

    setup_logging(quiet, verbose)
    settings = load_settings(FinetuneSettings, config, overrides or [])
    from canopy.training.fit import finetune

    command = shlex.join(["canopy", *sys.argv[1:]])
    with progress_bar(quiet or json_) as progress:
        exported = finetune(
            settings,
            run_dir,
            resume=resume,
            fast_dev_run=fast_dev_run,
            command=command,
            progress=progress,
        )
    if fast_dev_run:
        if json_:
            print_json({"fast_dev_run": True, "config": str(config)})
        elif not quiet:
            typer.echo(f"{config}: two steps, validation and export work")
        return
    from canopy.models.registry import describe

    card = describe(exported)["card"]
    if json_:
        keys = ("steps", "minutes", "exported", "val", "seen")
        print_json(
            {"model": str(exported), "run_dir": str(run_dir), **{k: card[k] for k in keys if k in card}}
        )
    elif not quiet:
        typer.echo(exported)
