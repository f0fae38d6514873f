"""`canopy pretrain`: parse, call, print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.common import Json, Quiet, Verbose, print_json


def pretrain(
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
        typer.Option("--fast-dev-run", help="Two steps, a probe and an export in a temporary folder."),
    ] = False,
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
    from lightning_utilities.core.rank_zero import rank_zero_only

    from canopy.config import load_settings
    from canopy.runtime import progress_bar, setup_logging
    from canopy.training.pretrain_settings import PretrainSettings

    setup_logging(quiet, verbose)
    settings = load_settings(PretrainSettings, config, overrides or [])
    from canopy.training import pretrain_run

    command = shlex.join(["canopy", *sys.argv[1:]])
    with progress_bar(quiet or json_) as progress:
        card = pretrain_run.pretrain(
            settings,
            run_dir,
            resume=resume,
            fast_dev_run=fast_dev_run,
            command=command,
            progress=progress,
        )
    if getattr(rank_zero_only, "rank", 0):
        return  # one of several processes has the word
    shown = {k: card[k] for k in ("objective", "steps", "minutes", "images_seen", "probe")}
    if json_:
        where = {"fast_dev_run": True} if fast_dev_run else {"encoder": str(run_dir / pretrain_run.ENCODER)}
        print_json({**where, "run_dir": str(run_dir), **shown})
    elif not quiet and fast_dev_run:
        typer.echo(f"{config}: two steps, probe and export work")
    elif not quiet:
        typer.echo(run_dir / pretrain_run.ENCODER)
