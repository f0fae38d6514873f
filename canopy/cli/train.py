"""`canopy train` and `canopy pretrain`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from canopy.config import find_config, shipped_configs
from canopy.files import check_output

if TYPE_CHECKING:
    from canopy.training.settings import FinetuneSettings, PretrainSettings


def _list(ctx: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    for name, path in shipped_configs("pretrain" if ctx.info_name == "pretrain" else "finetune").items():
        said = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        typer.echo(f"{name:22} {' '.join(said).partition('. ')[0]}")
    raise typer.Exit


ListConfigs = Annotated[
    bool, typer.Option("--list", callback=_list, is_eager=True, help="Name the configs that come along.")
]


def train(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = Path("run"),
    resume: Resume = False,
    fast_dev_run: FastDevRun = False,
    list_: ListConfigs = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a height model on the chips of `canopy data chips`.

    RUN_DIR gets config.yaml (all settings), log/metrics.csv and log/tensorboard, last.ckpt, best-STEP.ckpt
    and, at the end, model.safetensors, which every --model takes. One line is said per validation. An
    interrupted run goes on with --resume; a finished one goes on when steps or minutes are raised.

    CONFIG is a file, or the name of one that comes along (--list): `tune` goes on from the default model.

    Example: canopy train tune data.chips=chips minutes=30 -o runs/first
    """
    from canopy.training.settings import FinetuneSettings

    config = find_config("finetune", config)
    settings = settings_of(FinetuneSettings, config, overrides, quiet, verbose)
    _run(settings, config, run_dir, resume, fast_dev_run, json_, quiet)


def pretrain(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = Path("run"),
    resume: Resume = False,
    fast_dev_run: FastDevRun = False,
    list_: ListConfigs = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Pretrain an encoder without labels on the chips of `canopy data chips` (DINOv2, or objective=mae).

    RUN_DIR gets config.yaml (all settings), log/metrics.csv and log/tensorboard (losses, throughput, spread
    and effective rank of the features, the probe), last.ckpt and, at the end, encoder.safetensors, from which
    canopy train starts with init_from=. An interrupted run goes on with --resume; a finished one goes on when
    steps or minutes are raised.

    Example: canopy pretrain cpu-small data.chips=chips minutes=30 -o runs/encoder
    """
    from canopy.training.settings import PretrainSettings

    config = find_config("pretrain", config)
    settings = settings_of(PretrainSettings, config, overrides, quiet, verbose)
    _run(settings, config, run_dir, resume, fast_dev_run, json_, quiet)


def _run(
    settings: FinetuneSettings | PretrainSettings,
    config: Path,
    run_dir: Path,
    resume: bool,
    fast_dev_run: bool,
    json_: bool,
    quiet: bool,
) -> None:
    from canopy.runtime import progress_bar
    from canopy.training import fit
    from canopy.training.optim import first_process
    from canopy.training.settings import FinetuneSettings

    settled = run_dir / "config.yaml"
    if not resume and settled.exists():  # a run writes its own
        check_output(settled, [config], overwrite=True)
    with progress_bar(quiet or json_) as progress:
        said: dict[str, Any] = {
            "resume": resume, "fast_dev_run": fast_dev_run, "command": command(), "progress": progress,
        }  # fmt: skip
        if isinstance(settings, FinetuneSettings):
            card, what, exported = fit.finetune(settings, run_dir, **said), "model", run_dir / fit.MODEL
        else:
            card, what, exported = fit.pretrain(settings, run_dir, **said), "encoder", run_dir / fit.ENCODER
    if not first_process():
        return  # one of several has the word
    if json_:
        where = {"fast_dev_run": True} if fast_dev_run else {what: str(exported)}
        keys = ("objective", "steps", "minutes", "exported", "val", "seen", "images_seen", "probe")
        print_json({**where, "run_dir": str(run_dir), **{k: card[k] for k in keys if k in card}})
    elif not quiet:
        typer.echo(f"{config}: two steps and all that follows them work" if fast_dev_run else exported)
