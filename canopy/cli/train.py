"""`canopy train`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import typer

from canopy.cli.common import Json, Quiet, Verbose, print_json
from canopy.cli.run_options import Config, FastDevRun, Overrides, Resume, RunDir, command, settings_of


def train(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = Path("run"),
    resume: Resume = False,
    fast_dev_run: FastDevRun = False,
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
    from canopy.runtime import progress_bar
    from canopy.training.settings import FinetuneSettings

    settings = settings_of(FinetuneSettings, config, overrides, quiet, verbose)
    from canopy.training.fit import finetune
    from canopy.training.processes import first_process

    with progress_bar(quiet or json_) as progress:
        exported = finetune(
            settings,
            run_dir,
            resume=resume,
            fast_dev_run=fast_dev_run,
            command=command(),
            progress=progress,
        )
    if not first_process():
        return  # one of several has the word
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
