"""`canopy train` and `canopy pretrain`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import typer

from canopy.cli.options import (
    Config,
    FastDevRun,
    Json,
    Overrides,
    Quiet,
    RunDir,
    Verbose,
    command,
    print_json,
    settings_of,
)
from canopy.cli.options import RunResume as Resume
from canopy.files import check_output


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

    RUN_DIR gets config.yaml (all settings), log/metrics.csv and log/tensorboard, last.ckpt, best-STEP.ckpt
    and, at the end, model.safetensors, which every --model takes. One line is said per validation. An
    interrupted run goes on with --resume; a finished one goes on when steps or minutes are raised.

    Example: canopy train configs/finetune/small.yaml data.chips=chips minutes=30 -o runs/first
    """
    from canopy.runtime import progress_bar
    from canopy.training.settings import FinetuneSettings

    settings = settings_of(FinetuneSettings, config, overrides, quiet, verbose)
    settled = run_dir / "config.yaml"
    if not resume and settled.exists():  # a run writes its own
        check_output(settled, [config], overwrite=True)
    from canopy.training.fit import finetune
    from canopy.training.run_folder import first_process

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
    from canopy.models.checkpoint import describe

    card = describe(exported)["card"]
    if json_:
        keys = ("steps", "minutes", "exported", "val", "seen")
        print_json(
            {"model": str(exported), "run_dir": str(run_dir), **{k: card[k] for k in keys if k in card}}
        )
    elif not quiet:
        typer.echo(exported)


def pretrain(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = Path("run"),
    resume: Resume = False,
    fast_dev_run: FastDevRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Pretrain an encoder without labels on the chips of `canopy data chips` (DINOv2, or objective=mae).

    RUN_DIR gets config.yaml (all settings), log/metrics.csv and log/tensorboard (losses, throughput, spread
    and effective rank of the features, the probe), last.ckpt and, at the end, encoder.safetensors, from which
    canopy train starts with init_from=. An interrupted run goes on with --resume; a finished one goes on when
    steps or minutes are raised.

    Example: canopy pretrain configs/pretrain/small.yaml data.chips=chips minutes=30 -o runs/encoder
    """
    from canopy.runtime import progress_bar
    from canopy.training.settings import PretrainSettings

    settings = settings_of(PretrainSettings, config, overrides, quiet, verbose)
    settled = run_dir / "config.yaml"
    if not resume and settled.exists():  # a run writes its own
        check_output(settled, [config], overwrite=True)
    from canopy.training.fit import ENCODER
    from canopy.training.fit import pretrain as run
    from canopy.training.run_folder import first_process

    with progress_bar(quiet or json_) as progress:
        card = run(
            settings,
            run_dir,
            resume=resume,
            fast_dev_run=fast_dev_run,
            command=command(),
            progress=progress,
        )
    if not first_process():
        return  # one of several has the word
    shown = {k: card[k] for k in ("objective", "steps", "minutes", "images_seen", "probe")}
    if json_:
        where = {"fast_dev_run": True} if fast_dev_run else {"encoder": str(run_dir / ENCODER)}
        print_json({**where, "run_dir": str(run_dir), **shown})
    elif not quiet and fast_dev_run:
        typer.echo(f"{config}: two steps, probe and export work")
    elif not quiet:
        typer.echo(run_dir / ENCODER)
