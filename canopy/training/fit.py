"""Run a training or a pretraining: data, Lightning's trainer, resume, export.

RUN_DIR holds all a reader needs to repeat a run: its settings, logs, checkpoints and what it exported.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from canopy.chips.data import ChipDataModule, StreamDataModule, site_weights, some_heights
from canopy.chips.store import ChipShards
from canopy.files import replacing
from canopy.models.checkpoint import load_strict, save_checkpoint
from canopy.models.height import HeightModel
from canopy.runtime import Progress, log, pick_device
from canopy.training.callbacks import AveragedWeights, NanGuard, Probe, Schedule, open_probe
from canopy.training.height import VAL_MAE, HeightModule, plain, score_chips
from canopy.training.optim import TrainingModule, first_process
from canopy.training.settings import FinetuneSettings, PretrainSettings
from canopy.training.ssl import DinoModule, MaeModule, PretrainModule
from canopy.training.ssl_data import ViewStream
from canopy.training.start import LAST, begin_from, expect_heights, held, read_weights, without_folders

MODEL, ENCODER = "model.safetensors", "encoder.safetensors"
FORMAT, FORMAT_VERSION = "canopy-encoder", "1"
Settings = FinetuneSettings | PretrainSettings


# ---- training on heights --------------------------------------------------------------------------------
def finetune(
    settings: FinetuneSettings,
    run_dir: Path,
    *,
    resume: bool = False,
    fast_dev_run: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train as `settings` say and export the averaged weights to RUN_DIR/model.safetensors.

    With `devices` or `nodes` above 1 Lightning starts the other processes, which run this same function; the
    first alone writes. RUN_DIR gets config.yaml (all settings), log*/metrics.csv, TensorBoard events where
    that is installed, last.ckpt, best-STEP.ckpt and model.safetensors.

    Args:
        settings: the whole run.
        run_dir: created.
        resume: continue from RUN_DIR/last.ckpt.
        fast_dev_run: two steps, a validation on two chips and an export, all in a temporary folder: what is
            wrong with a config, its data or its model shows in seconds. RUN_DIR is left alone.
        command: how the run was started, for the card.
        progress: told about per cent.

    Returns:
        The model's card.

    Raises:
        ConfigError: RUN_DIR holds a run and `resume` is off, there is nothing to resume, settings were
            changed, or another process trains there.
        DataError, CheckpointError: the chips or the weights to start from cannot be used.
        TrainingError: loss or gradient were not finite too often.
    """
    if fast_dev_run:
        data = {"data": settings.data.model_copy(update={"val_chips": 2})}
        brief = _BRIEF | data | {"validate_every": 1, "workers": 0}
        with TemporaryDirectory() as folder:
            return finetune(settings.model_copy(update=brief), Path(folder), command=command)
    device = pick_device(settings.device)
    settings, start = begin_from(settings)
    data_module = ChipDataModule(
        settings.data, batch=settings.batch, crop_px=settings.crop_px, augment=settings.augment,
        gsd_m=settings.architecture.gsd_m, seed=settings.seed, workers=settings.workers, sample="height",
        with_shots=settings.loss.footprint != 0,
    )  # fmt: skip
    chosen = data_module.chosen
    with held(run_dir, settings, resume):
        _begin(settings)
        validates = bool(len(chosen.val))
        if first_process() and not validates:
            log.warning(
                "note: no val chips: nothing is scored, and the last weights are exported as they are"
            )
        model = HeightModel(settings.architecture)
        if not resume:
            if settings.loss.expect_heights:
                expect_heights(model, torch.from_numpy(some_heights(chosen.train)))
            if start is not None:
                start.load_into(model)
        schedule = Schedule(settings.steps, settings.minutes, progress, settings.name)
        best = _keeper(run_dir, "best-{step:07d}", monitor=VAL_MAE)
        callbacks: list[pl.Callback] = [schedule, NanGuard(), AveragedWeights(settings.ema_final)]
        if validates and settings.patience:
            callbacks += [EarlyStopping(VAL_MAE, patience=settings.patience, check_on_train_epoch_end=False)]
        if validates and settings.exports_best:
            callbacks += [best]
        # Written after each validation, so that it knows of it.
        every = settings.validate_every
        callbacks += [_keeper(run_dir, Path(LAST).stem, None if validates else every)]
        more = {"val_check_interval": every if validates else None, "check_val_every_n_epoch": None}
        trainer = _trainer(settings, run_dir, device, callbacks, **more)
        _fit(trainer, HeightModule(model, settings), data_module, run_dir, resume)
        card = _card(settings, trainer, schedule, command) | {"data": chosen.facts()}
        card["licence"] = settings.licence or chosen.licence
        if start is not None:
            card["started_from"] = start.facts
        if trainer.is_global_zero:
            kept = Path(best.best_model_path) if best.best_model_path else None
            _export_model(settings, run_dir, kept, data_module, device, card)
    return card


def _export_model(
    settings: FinetuneSettings,
    run_dir: Path,
    best: Path | None,
    data: ChipDataModule,
    device: torch.device,
    card: dict[str, Any],
) -> None:
    """Write the best or last averaged weights and their card, completed in place."""
    model = HeightModel(settings.architecture)
    path = best or run_dir / LAST
    load_strict(model, read_weights(path), path)
    model = model.to(device).eval()
    step = best and int(best.stem.split("-")[-1])
    card["parameters"] = model.parameter_count
    card["exported"] = f"best of the validations, step {step}" if step else "last"
    if len(data.chosen.val):
        table = score_chips(model, data.chosen.val, crop_px=settings.crop_px, overlap_px=0)
        card["seen" if data.chosen.val_seen else "val"] = plain(table)
    save_checkpoint(run_dir / MODEL, model, card)


# ---- pretraining ----------------------------------------------------------------------------------------
def pretrain(
    settings: PretrainSettings,
    run_dir: Path,
    *,
    resume: bool = False,
    fast_dev_run: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pretrain as `settings` say and export the encoder to RUN_DIR/encoder.safetensors.

    Arguments, errors and files are those of `finetune`; `fast_dev_run` probes once.

    Returns:
        The export's card: steps, minutes, probe scores and where from.
    """
    if fast_dev_run:
        brief = _BRIEF | {"probe": settings.probe.model_copy(update={"every": 2})}
        with TemporaryDirectory() as folder:
            return pretrain(settings.model_copy(update=brief), Path(folder), command=command)
    device = pick_device(settings.device)
    settings, start = begin_from(settings)
    stream, probe = view_stream(settings), _probe(settings)  # before anything is written
    with held(run_dir, settings, resume):
        _begin(settings)
        module: PretrainModule = (MaeModule if settings.objective == "mae" else DinoModule)(settings, stream)
        if start is not None and start.encoder is not None and not resume:
            for encoder in module.encoders():
                start.encoder.load_into(encoder)
        schedule = Schedule(settings.steps, settings.minutes, progress, settings.name)
        callbacks: list[pl.Callback] = [schedule, NanGuard(), *([probe] if probe else [])]
        callbacks.append(_keeper(run_dir, Path(LAST).stem, settings.checkpoint_every))
        if settings.keep_every:
            callbacks.append(_keeper(run_dir, "{step}", settings.keep_every, top=-1))
        trainer = _trainer(settings, run_dir, device, callbacks)
        _fit(trainer, module, StreamDataModule(stream, settings.data.workers), run_dir, resume)
        card = _card(settings, trainer, schedule, command)
        card |= {
            "objective": settings.objective,
            "images_seen": trainer.global_step * settings.batch * trainer.world_size,
            "data": {"chips": len(stream.shards), "sha256": stream.shards.fingerprint},
            "probe": probe.scores if probe and probe.at == trainer.global_step else {},
            "licence": settings.licence or "not stated",
        }
        if start is not None:
            card["started_from"] = start.facts
        if trainer.is_global_zero:
            _export_encoder(module, run_dir / ENCODER, card)
    return card


def view_stream(settings: PretrainSettings) -> ViewStream:
    """The views of a run. Raises DataError where there are no chips, or chips of another scale."""
    shards = ChipShards(settings.data.chips, splits=settings.data.splits)
    shards.require_gsd(settings.architecture.gsd_m)
    weights = site_weights(shards.rows, settings.data.site_power)
    patch = settings.architecture.patch_px
    return ViewStream(shards, settings.batch, settings.rules, patch, settings.seed, weights)


def _probe(settings: PretrainSettings) -> Probe | None:
    if not settings.probe.every:
        return None
    shards = ChipShards(settings.probe.labels or settings.data.chips)
    shards.require_gsd(settings.architecture.gsd_m)
    return open_probe(shards, settings.architecture.patch_px, settings.probe.chips, settings.probe.every)


def _export_encoder(module: PretrainModule, path: Path, card: dict[str, Any]) -> None:
    """Write the useful encoder (the teacher's, with DINOv2) as `encoder.*`, named as in a HeightModel.

    The metadata: format, format_version, `encoder` (its config as JSON), `bands`, `mean`, `std`, and `card`.
    """
    from safetensors.torch import save_file

    config, weights = module.config.to_dict(), module.useful_encoder().state_dict()
    state = {f"encoder.{k}": v.detach().cpu().contiguous() for k, v in weights.items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "card": json.dumps(card)}
    header |= {name: json.dumps(config[name]) for name in ("encoder", "bands", "mean", "std")}
    with replacing(path) as part:
        save_file(state, part, metadata=header)
        part.chmod(0o644)  # safetensors writes 0600, which nobody else could read


# ---- both -----------------------------------------------------------------------------------------------
_BRIEF = {"steps": 2, "minutes": None, "log_every": 1}


def _begin(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # it advertises


def _keeper(
    folder: Path, name: str, every: int | None = None, *, top: int = 1, monitor: str | None = None
) -> ModelCheckpoint:
    """Lightning's callback that writes NAME.ckpt: every so many steps, or (None) after each validation."""
    return ModelCheckpoint(
        dirpath=folder,
        filename=name,
        monitor=monitor,
        save_top_k=top,
        every_n_train_steps=every,
        save_on_train_epoch_end=False,
        auto_insert_metric_name=monitor is None,
        enable_version_counter=False,
    )


def _trainer(
    settings: Settings, run_dir: Path, device: torch.device, callbacks: Sequence[pl.Callback], **more: Any
) -> pl.Trainer:
    several = settings.processes > 1
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=[device.index] if device.index is not None else settings.devices,
        num_nodes=settings.nodes,
        strategy=settings.strategy,
        sync_batchnorm=several and device.type == "cuda",
        precision=settings.precision,
        max_steps=settings.steps,
        gradient_clip_val=settings.clip_norm or None,
        logger=_loggers(run_dir, settings),
        callbacks=list(callbacks),
        log_every_n_steps=settings.log_every,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **more,
    )


def _loggers(run_dir: Path, settings: Settings) -> list[Logger]:
    """CSV, and TensorBoard where installed. A resumed run logs beside what it logged before."""
    version, n = "log", 2
    while (run_dir / version).exists():
        version, n = f"log{n}", n + 1
    every = settings.log_every
    out: list[Logger] = [CSVLogger(run_dir, name="", version=version, flush_logs_every_n_steps=every)]
    if settings.tensorboard and importlib.util.find_spec("tensorboard"):
        out.append(TensorBoardLogger(run_dir, name="", version=version, sub_dir="tensorboard"))
    return out


def _fit(
    trainer: pl.Trainer, module: TrainingModule, data: pl.LightningDataModule, run_dir: Path, resume: bool
) -> None:
    """Train, and leave RUN_DIR/last.ckpt as it is at the end."""
    # Channels last is how convolutions run fastest, on CPUs and GPUs alike.
    module.to(memory_format=torch.channels_last)
    if module.settings.compile:  # type: ignore[union-attr]
        for name, part in module.named_modules():
            if re.search(r"\bblocks\.\d+$", name):
                part.compile()  # where it stands: names of weights stay
    with warnings.catch_warnings():
        # Batches are made whole by the stream; Lightning's advice about loaders does not apply.
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        if not resume and isinstance(data, ChipDataModule) and len(data.val):
            trainer.validate(module, datamodule=data, verbose=False)  # what the run begins with
        trainer.fit(module, datamodule=data, ckpt_path=run_dir / LAST if resume else None, weights_only=True)
        trainer.save_checkpoint(run_dir / LAST)


def _card(settings: Settings, trainer: pl.Trainer, schedule: Schedule, command: str) -> dict[str, Any]:
    """What every export says of its run; files by name alone, for folders are this machine's."""
    facts = json.loads(settings.model_dump_json(exclude={"model"}))
    facts["data"]["chips"] = [place.name for place in settings.data.chips]
    if isinstance(settings, PretrainSettings) and settings.probe.labels:
        facts["probe"]["labels"] = [place.name for place in settings.probe.labels]
    elif isinstance(settings, FinetuneSettings) and settings.init_from:
        facts["init_from"] = Path(settings.init_from).name
    return {
        "name": settings.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": without_folders(command),
        "settings": facts,
        "steps": trainer.global_step,
        "minutes": round(schedule.time_elapsed() / 60, 2),
    }
