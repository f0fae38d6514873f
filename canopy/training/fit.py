"""Run a training: data, trainer, resume, log, export. RUN_DIR holds all a reader needs to repeat it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from canopy.chips.augment import AugmentConfig
from canopy.chips.dataset import CropStream, chip_weights
from canopy.chips.store import ChipStore, read_store
from canopy.errors import ConfigError
from canopy.models.checkpoint import save_checkpoint
from canopy.models.config import ModelConfig
from canopy.models.height import HeightModel
from canopy.runtime import log
from canopy.training.finetune import HeightModule
from canopy.training.scoring import plain, score_chips
from canopy.training.settings import FinetuneSettings

LAST = "last.ckpt"


def finetune(settings: FinetuneSettings, run_dir: Path, *, resume: bool = False, command: str = "") -> Path:
    """Train as `settings` say and export the averaged weights to RUN_DIR/model.safetensors.

    Args:
        settings: the whole run.
        run_dir: created; `settings.json`, `metrics.csv`, `last.ckpt` and `model.safetensors` go here.
        resume: continue from RUN_DIR/last.ckpt.
        command: how the run was started, for the card.

    Raises:
        ConfigError: RUN_DIR holds a run and `resume` is off, or there is nothing to resume.
    """
    last = run_dir / LAST
    if resume != last.exists():
        raise ConfigError(
            "holds no run to resume" if resume else "holds a run already",
            where=run_dir,
            remedy="leave out --resume" if resume else "add --resume, or choose another folder",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "settings.json").write_text(settings.model_dump_json(indent=2))
    torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed, verbose=False)
    store = read_store(settings.data.chips)
    model = HeightModel(ModelConfig.from_dict(settings.model))
    if settings.init_from and not resume:
        _start_from(model, settings.init_from)
    model = model.to(memory_format=torch.channels_last)
    module = HeightModule(model, settings, store.of_split("val"))
    trainer = _trainer(settings, run_dir)
    trainer.fit(module, _loader(settings, store, last), ckpt_path=last if resume else None, weights_only=True)
    trainer.save_checkpoint(last)
    return export(module, store, run_dir, command)


def _start_from(model: HeightModel, checkpoint: Path) -> None:
    """Copy the averaged weights of an earlier run into `model` wherever name and shape agree."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    own = model.state_dict()
    found = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
    fits = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    if not fits:
        raise ConfigError("has no weights that fit the model", where=checkpoint)
    model.load_state_dict(fits, strict=False)
    log.info("%d of %d tensors start from %s", len(fits), len(own), checkpoint)


def _trainer(settings: FinetuneSettings, run_dir: Path) -> pl.Trainer:
    keep = ModelCheckpoint(
        dirpath=run_dir,
        filename="last",
        every_n_train_steps=settings.validate_every,
        save_top_k=1,
        enable_version_counter=False,
    )
    return pl.Trainer(
        accelerator=settings.device,
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]
        max_steps=settings.steps,
        gradient_clip_val=settings.clip_norm,
        logger=CSVLogger(run_dir, name="", version="log", flush_logs_every_n_steps=settings.log_every),
        callbacks=[keep],
        log_every_n_steps=settings.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _loader(settings: FinetuneSettings, store: ChipStore, last: Path) -> DataLoader[Any]:
    chips = store.of_split("train")
    weights = chip_weights(chips, settings.data.neon_share, settings.data.synth_share)
    start = 0
    if last.exists():
        start = int(torch.load(last, map_location="cpu", weights_only=True)["global_step"]) * settings.batch
    stream = CropStream(
        chips, weights, settings.crop_px, AugmentConfig(**settings.augment.model_dump()), settings.seed, start
    )
    return DataLoader(
        stream,
        batch_size=settings.batch,
        num_workers=settings.workers,
        # A forked child would inherit torch's threads in whatever state they are.
        multiprocessing_context="spawn" if settings.workers else None,
    )


def _shareable(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings for a card: files by name alone, because folders are this machine's business."""
    plain_settings = json.loads(settings.model_dump_json(exclude={"model"}))
    plain_settings["data"]["chips"] = settings.data.chips.name
    if settings.init_from:
        plain_settings["init_from"] = settings.init_from.name
    return plain_settings


def export(module: HeightModule, store: ChipStore, run_dir: Path, command: str) -> Path:
    """Write the averaged weights and their card."""
    settings = module.settings
    card = {
        "name": settings.name,
        "licence": "Apache-2.0",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
        "settings": _shareable(settings),
        "steps": module.global_step,
        "minutes": round(module.trained_s / 60, 1),
        "parameters": module.ema.parameter_count,
        "data": {
            "sha256": store.data_sha256,
            "train_ids": [c.row.id for c in store.of_split("train")],
            "val_ids": [c.row.id for c in store.of_split("val")],
        },
        "val": plain(score_chips(module.ema, module.val_chips)) if module.val_chips else {},
    }
    path = run_dir / "model.safetensors"
    save_checkpoint(path, module.ema, card)
    return path
