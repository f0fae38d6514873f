"""`canopy pretrain`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import typer

from canopy.cli.common import Json, Quiet, Verbose, print_json
from canopy.cli.run_options import Config, FastDevRun, Overrides, Resume, RunDir, command, settings_of


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
    from canopy.training.pretrain_settings import PretrainSettings

    settings = settings_of(PretrainSettings, config, overrides, quiet, verbose)
    from canopy.training import pretrain_run
    from canopy.training.processes import first_process

    with progress_bar(quiet or json_) as progress:
        card = pretrain_run.pretrain(
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
        where = {"fast_dev_run": True} if fast_dev_run else {"encoder": str(run_dir / pretrain_run.ENCODER)}
        print_json({**where, "run_dir": str(run_dir), **shown})
    elif not quiet and fast_dev_run:
        typer.echo(f"{config}: two steps, probe and export work")
    elif not quiet:
        typer.echo(run_dir / pretrain_run.ENCODER)
