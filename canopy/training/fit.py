"""Run a training or a pretraining: data, Lightning's trainer, resume, export.

RUN_DIR holds all a reader needs to repeat a run: its settings, logs, checkpoints and what it exported.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from canopy.chips.data import ChipDataModule, StreamDataModule, choose_chips, site_weights, some_heights
from canopy.chips.store import ChipShards
from canopy.files import replacing
from canopy.models.checkpoint import load_strict, save_checkpoint
from canopy.models.encoder import Encoder
from canopy.models.height import HeightModel
from canopy.models.registry import resolve_model
from canopy.runtime import Progress, log, pick_device
from canopy.training.callbacks import AveragedWeights, NanGuard, Probe, Schedule, open_probe
from canopy.training.height import VAL_MAE, HeightModule
from canopy.training.optim import TrainingModule, compile_parts
from canopy.training.run_folder import LAST, first_process, held, without_folders
from canopy.training.scoring import plain, score_chips
from canopy.training.settings import FinetuneSettings, PretrainSettings, RunSettings, shown
from canopy.training.ssl import DinoModule, MaeModule, PretrainModule
from canopy.training.ssl_data import ViewStream
from canopy.training.start import describe_start, expect_heights, read_weights, start_from

MODEL, ENCODER = "model.safetensors", "encoder.safetensors"
FORMAT, FORMAT_VERSION = "canopy-encoder", "1"
_WEIGHTS = (".safetensors", ".ckpt")
# What a resumed run may change: how long, on what machine, how it is watched.
_FREE = {"steps", "minutes", "threads", "device", "log_every", "compile", "tensorboard"}
FREE = frozenset({*_FREE, "workers", "patience"})
PRETRAIN_FREE = frozenset(
    {*_FREE, "checkpoint_every", "keep_every", "data.workers", "probe.every", "probe.labels", "probe.chips"}
)
R = TypeVar("R", FinetuneSettings, PretrainSettings)


# ---- training on heights --------------------------------------------------------------------------------
def finetune(
    settings: FinetuneSettings,
    run_dir: Path,
    *,
    resume: bool = False,
    fast_dev_run: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Path:
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

    Raises:
        ConfigError: RUN_DIR holds a run and `resume` is off, there is nothing to resume, settings were
            changed, or another process trains there.
        DataError, CheckpointError: the chips or the weights to start from cannot be used.
        TrainingError: loss or gradient were not finite too often.
    """
    if fast_dev_run:
        brief = {"validate_every": 1, "workers": 0}
        data = {"data": settings.data.model_copy(update={"val_chips": 2})}
        with TemporaryDirectory() as folder:
            finetune(_shortened(settings, brief | data), Path(folder), command=command, progress=progress)
        return run_dir
    device = pick_device(settings.device)
    chosen = choose_chips(settings.data, settings.architecture.gsd_m)
    data_module = ChipDataModule(
        settings.data,
        chosen,
        settings.batch,
        settings.crop_px,
        settings.augment,
        seed=settings.seed,
        workers=settings.workers,
        with_shots=settings.loss.footprint != 0,
    )
    start = _start(settings.init_from)
    with held(run_dir, settings, resume, FREE):
        if first_process() and not len(chosen.val):
            log.warning(
                "note: no val chips: nothing is scored, and the last weights are exported as they are"
            )
        _begin(settings)
        model = HeightModel(settings.architecture)
        if not resume:
            if settings.loss.expect_heights:
                expect_heights(model, torch.from_numpy(some_heights(chosen.train)))
            if start is not None:
                start_from(model, start, settings.init_part)
        module, kept = HeightModule(model, settings), _Kept(run_dir, settings, bool(len(chosen.val)))
        schedule = Schedule(settings.steps, settings.minutes, progress, settings.name)
        callbacks = [schedule, NanGuard(), AveragedWeights(settings.ema_final), *kept.callbacks]
        trainer = _trainer(
            settings,
            run_dir,
            device,
            callbacks,
            val_check_interval=settings.validate_every if len(chosen.val) else None,
            check_val_every_n_epoch=None,
        )
        _fit(trainer, module, data_module, run_dir, resume)
        if trainer.is_global_zero:
            card = _card(settings, trainer, schedule, command) | {"data": chosen.facts()}
            if start is not None:
                card["started_from"] = describe_start(start)
            _export_model(settings, run_dir, kept.best, data_module, device, card)
    return run_dir / MODEL


def _start(name: str | None) -> Path | None:
    """The file that `init_from` names: a file of weights, or a model's name."""
    path = Path(name or "")
    return None if name is None else path if path.suffix in _WEIGHTS else resolve_model(name)


class _Kept:
    """Which checkpoints a fine-tuning keeps: the last, and the best of its validations."""

    def __init__(self, folder: Path, settings: FinetuneSettings, validates: bool) -> None:
        # Written after each validation, so that it knows of it.
        last = _keeper(folder, Path(LAST).stem, 1, None if validates else settings.validate_every)
        self.callbacks: list[pl.Callback] = [last]
        self._best: ModelCheckpoint | None = None
        if validates and settings.exports_best:
            self._best = _keeper(folder, "best-{step:07d}", 1, None, monitor=VAL_MAE)
            self.callbacks.insert(0, self._best)
        if validates and settings.patience:
            stop = EarlyStopping(VAL_MAE, patience=settings.patience, check_on_train_epoch_end=False)
            self.callbacks.insert(0, stop)

    @property
    def best(self) -> Path | None:
        """The best checkpoint, where one is looked for."""
        return Path(self._best.best_model_path) if self._best and self._best.best_model_path else None


def _export_model(
    settings: FinetuneSettings,
    run_dir: Path,
    best: Path | None,
    data: ChipDataModule,
    device: torch.device,
    card: dict[str, Any],
) -> None:
    """Write the best or last averaged weights and their card."""
    model = HeightModel(settings.architecture)
    path = best or run_dir / LAST
    load_strict(model, read_weights(path), path)
    model = model.to(device).eval()
    step = best and best.stem.split("-")[-1]
    card |= {
        "parameters": model.parameter_count,
        "exported": f"best of the validations, step {int(step)}" if step else "last",
    }
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

    Args:
        settings: the whole run.
        run_dir: created; `config.yaml`, `log*/metrics.csv`, `last.ckpt` and `encoder.safetensors` go here.
        resume: continue from RUN_DIR/last.ckpt.
        fast_dev_run: two steps, a probe and an export in a temporary folder, to see that everything works.
        command: how the run was started, for the export.
        progress: told about per cent.

    Returns:
        The export's card: steps, minutes, probe scores and where from.

    Raises:
        ConfigError: RUN_DIR holds a run and `resume` is off, there is nothing to resume, settings were
            changed, or another process trains there.
        DataError: no chips, chips of another scale, or a checkpoint of other chips.
        TrainingError: losses or gradients were not finite too often.
    """
    if fast_dev_run:
        brief = {"probe": settings.probe.model_copy(update={"every": 2})}
        with TemporaryDirectory() as folder:
            return pretrain(_shortened(settings, brief), Path(folder), command=command, progress=progress)
    device = pick_device(settings.device)
    stream, probe = view_stream(settings), _probe(settings)  # before anything is written
    with held(run_dir, settings, resume, PRETRAIN_FREE):
        _begin(settings)
        module: PretrainModule = (MaeModule if settings.objective == "mae" else DinoModule)(settings, stream)
        schedule = Schedule(settings.steps, settings.minutes, progress, settings.name)
        callbacks: list[pl.Callback] = [schedule, NanGuard(), *probe]
        callbacks.append(_keeper(run_dir, Path(LAST).stem, 1, settings.checkpoint_every))
        if settings.keep_every:
            callbacks.append(_keeper(run_dir, "{step}", -1, settings.keep_every))
        trainer = _trainer(settings, run_dir, device, callbacks)
        _fit(trainer, module, StreamDataModule(stream, settings.data.workers), run_dir, resume)
        card = _card(settings, trainer, schedule, command)
        card |= {
            "objective": settings.objective,
            "images_seen": trainer.global_step * settings.images * trainer.world_size,
            "data": {"chips": len(stream.shards), "sha256": stream.shards.fingerprint},
            "probe": probe[0].scores if probe and probe[0].at == trainer.global_step else {},
        }
        if trainer.is_global_zero:
            export(module, module.useful_encoder(), run_dir / ENCODER, card)
    return card


def view_stream(settings: PretrainSettings) -> ViewStream:
    """The views of a run. Raises DataError where there are no chips, or chips of another scale."""
    shards = ChipShards(settings.data.chips, splits=settings.data.splits)
    shards.require_gsd(settings.architecture.gsd_m)
    share = settings.final.share
    return ViewStream(
        shards,
        settings.images,
        settings.rules(),
        settings.rules(final=True),
        late_from=round(settings.steps * (1 - share)) if share else None,
        patch_px=settings.architecture.patch_px,
        seed=settings.seed,
        chances=site_weights(shards.rows, settings.data.site_power),
    )


def _probe(settings: PretrainSettings) -> list[Probe]:
    """The probe, or none."""
    if not settings.probe.every:
        return []
    labels, model = settings.probe.labels or settings.data.chips, settings.architecture
    probe = open_probe(labels, model.patch_px, settings.probe.chips, model.gsd_m)
    return [Probe(probe, settings.probe.every)] if probe else []


def export(module: PretrainModule, encoder: Encoder, path: Path, card: dict[str, Any]) -> None:
    """Write the useful encoder (the teacher's, with DINOv2) as `encoder.*`, named as in a HeightModel.

    The metadata: format, format_version, `encoder` (its config as JSON), `bands`, `mean`, `std`, and `card`.
    """
    from safetensors.torch import save_file

    plain_config = module.config.to_dict()
    state = {f"encoder.{k}": v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "card": json.dumps(card)}
    header |= {name: json.dumps(plain_config[name]) for name in ("encoder", "bands", "mean", "std")}
    with replacing(path) as part:
        save_file(state, part, metadata=header)
        part.chmod(0o644)  # safetensors writes 0600, which nobody else could read


# ---- both -----------------------------------------------------------------------------------------------
def _shortened(settings: R, changes: dict[str, Any]) -> R:
    return settings.model_copy(update={"steps": 2, "minutes": None, "log_every": 1} | changes)


def _begin(settings: RunSettings) -> None:
    torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # it advertises


def _keeper(
    folder: Path, name: str, top: int, every: int | None, monitor: str | None = None
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
    settings: FinetuneSettings | PretrainSettings,
    run_dir: Path,
    device: torch.device,
    callbacks: Sequence[pl.Callback],
    **more: Any,
) -> pl.Trainer:
    several = settings.processes > 1
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=[device.index] if device.index is not None else settings.devices,
        num_nodes=settings.nodes,
        strategy="ddp" if several else settings.strategy,
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


def _loggers(run_dir: Path, settings: RunSettings) -> list[Logger]:
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
        compile_parts(module)
    with warnings.catch_warnings():
        # Batches are made whole by the stream; Lightning's advice about loaders does not apply.
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, datamodule=data, ckpt_path=run_dir / LAST if resume else None, weights_only=True)
        trainer.save_checkpoint(run_dir / LAST)


def _card(
    settings: FinetuneSettings | PretrainSettings, trainer: pl.Trainer, schedule: Schedule, command: str
) -> dict[str, Any]:
    """What every export says of its run; files by name alone, for folders are this machine's."""
    facts = json.loads(settings.model_dump_json(exclude={"model"}))
    facts["data"]["chips"] = shown(settings.data.chips)
    if isinstance(settings, PretrainSettings):
        facts["probe"]["labels"] = shown(settings.probe.labels)
    elif settings.init_from:
        facts["init_from"] = Path(settings.init_from).name
    return {
        "name": settings.name,
        "licence": settings.licence,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": without_folders(command),
        "settings": facts,
        "steps": trainer.global_step,
        "minutes": round(schedule.time_elapsed() / 60, 2),
    }
