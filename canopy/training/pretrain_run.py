"""Run a pretraining: data, probe, trainer, resume, logs, export. RUN_DIR holds all it takes to repeat it."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy

from canopy.files import replacing
from canopy.models.encoder import Encoder
from canopy.runtime import Progress, pick_device
from canopy.training.compiling import compile_parts
from canopy.training.pretrain import PretrainModule
from canopy.training.pretrain_dinov2 import DinoModule
from canopy.training.pretrain_mae import MaeModule
from canopy.training.pretrain_settings import PretrainSettings
from canopy.training.probe import HeightProbe, open_probe
from canopy.training.run_folder import LAST, held
from canopy.training.run_settings import shown
from canopy.training.ssl_data import ViewStream, open_stream

ENCODER = "encoder.safetensors"
# What a resumed run may change: how long, on what machine, how it is watched.
FREE = frozenset(
    {
        "steps", "minutes", "threads", "device", "log_every", "compile", "checkpoint_every", "keep_every",
        "data.workers", "probe.every", "probe.labels", "probe.chips",
    }
)  # fmt: skip
FORMAT, FORMAT_VERSION = "canopy-encoder", "1"


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
        with TemporaryDirectory() as folder:
            return pretrain(_shortened(settings), Path(folder), command=command, progress=progress)
    device = pick_device(settings.device).type
    stream, probe_of = open_stream(settings), _probe(settings)  # before anything is written
    with held(run_dir, settings, resume, FREE):
        module, trainer = _trained(settings, run_dir, stream, probe_of, device, resume, progress)
        module.probe_at_last()  # where no step was left to take
        trainer.save_checkpoint(run_dir / LAST)
        card, encoder = _card(module, stream, command), module.useful_encoder()
        if trainer.is_global_zero:
            export(module, encoder, run_dir / ENCODER, card)
    return card


def _trained(
    settings: PretrainSettings,
    run_dir: Path,
    stream: ViewStream,
    probe_of: HeightProbe | None,
    device: str,
    resume: bool,
    progress: Progress | None,
) -> tuple[PretrainModule, pl.Trainer]:
    torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed, verbose=False)
    kind = MaeModule if settings.objective == "mae" else DinoModule
    module = kind(settings, stream, probe_of)
    if settings.strategy != "fsdp":  # which takes contiguous weights only
        module.to(memory_format=torch.channels_last)
    if device == "cpu":
        _attend_plainly(module)
    if settings.compile:
        compile_parts(module)
    trainer = _trainer(settings, run_dir, device, [_Percent(progress)] if progress else [])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, ckpt_path=run_dir / LAST if resume else None, weights_only=True)
    return module, trainer


def _shortened(settings: PretrainSettings) -> PretrainSettings:
    probe = settings.probe.model_copy(update={"every": 2})
    return settings.model_copy(update={"steps": 2, "minutes": None, "log_every": 1, "probe": probe})


def _probe(settings: PretrainSettings) -> HeightProbe | None:
    if not settings.probe.every:
        return None
    labels = settings.probe.labels or settings.data.chips
    model = settings.architecture
    return open_probe(labels, model.patch_px, settings.probe.chips, model.gsd_m)


def _attend_plainly(module: PretrainModule) -> None:
    """On a CPU, for a few dozen tokens, plain products are faster than torch's fused attention (backward)."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # type: ignore[assignment]


class _Percent(pl.Callback):
    """Tells a progress bar how many per cent of the run are done."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.said = progress, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.progress.start(100, "pretraining, per cent")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        done = int(100 * module.progress)  # type: ignore[operator]
        if trainer.is_global_zero:
            self.progress.advance(done - self.said)
        self.said = done


def _trainer(
    settings: PretrainSettings, run_dir: Path, device: str, callbacks: list[pl.Callback]
) -> pl.Trainer:
    def keeper(name: str, every: int, top: int) -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=run_dir,
            filename=name,
            every_n_train_steps=every,
            save_top_k=top,
            enable_version_counter=False,
        )

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # it advertises
    callbacks = [*callbacks, keeper("last", settings.checkpoint_every, 1)]
    if settings.keep_every:
        callbacks.append(keeper("{step}", settings.keep_every, -1))
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=_strategy(settings, device),
        sync_batchnorm=device == "cuda" and settings.processes > 1,
        precision=settings.precision,
        max_steps=settings.steps,
        logger=_loggers(run_dir, settings.log_every),
        callbacks=callbacks,
        log_every_n_steps=settings.log_every,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _strategy(settings: PretrainSettings, device: str) -> str | Strategy:
    if settings.strategy != "fsdp":
        return settings.strategy
    return ModelParallelStrategy(
        data_parallel_size=settings.processes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,  # one file of whole weights, which the first process writes
        process_group_backend="gloo" if device == "cpu" else None,
    )


def _loggers(run_dir: Path, every: int) -> list[Logger]:
    """CSV, and TensorBoard where installed. A resumed run logs beside what it logged before."""
    version, n = "log", 2
    while (run_dir / version).exists():
        version, n = f"log{n}", n + 1
    out: list[Logger] = [CSVLogger(run_dir, name="", version=version, flush_logs_every_n_steps=every)]
    if importlib.util.find_spec("tensorboard"):
        out.append(TensorBoardLogger(run_dir, name="", version=version, sub_dir="tensorboard"))
    return out


def _card(module: PretrainModule, stream: ViewStream, command: str) -> dict[str, Any]:
    settings = module.settings
    facts = json.loads(settings.model_dump_json(exclude={"model"}))
    facts["data"]["chips"], facts["probe"]["labels"] = (
        shown(settings.data.chips), shown(settings.probe.labels)
    )  # fmt: skip
    return {
        "name": settings.name,
        "licence": settings.licence,
        "objective": settings.objective,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
        "settings": facts,
        "steps": module.global_step,
        "minutes": round(module.trained_s / 60, 2),
        "images_seen": module.global_step * settings.images * stream.world,
        "data": {"chips": len(stream.shards), "sha256": stream.shards.fingerprint},
        "probe": module.probed if module.probed_at == module.global_step else {},
    }


def export(module: PretrainModule, encoder: Encoder, path: Path, card: dict[str, Any]) -> None:
    """Write the useful encoder (the teacher's, with DINOv2) as `encoder.*`, named as in a HeightModel.

    The metadata: format, format_version, `encoder` (its config as JSON), `bands`, `mean`, `std`, and `card`.
    """
    from safetensors.torch import save_file

    config = module.config
    plain = config.to_dict()
    state = {f"encoder.{k}": v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "card": json.dumps(card)}
    header |= {name: json.dumps(plain[name]) for name in ("encoder", "bands", "mean", "std")}
    with replacing(path) as part:
        save_file(state, part, metadata=header)
        part.chmod(0o644)  # safetensors writes 0600, which nobody else could read
