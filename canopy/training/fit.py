"""Run a training: data, trainer, resume, log, export. RUN_DIR holds all a reader needs to repeat it."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from canopy.chips.streams import ChipBatches
from canopy.errors import ConfigError
from canopy.models.checkpoint import load_model, save_checkpoint
from canopy.models.height import HeightModel
from canopy.runtime import NoProgress, Progress, log, pick_device
from canopy.training.compiling import compile_parts
from canopy.training.data import TrainingData, batches, open_data, some_heights
from canopy.training.finetune import HeightModule, Scores
from canopy.training.processes import first_process
from canopy.training.run_folder import LAST, Table, held, without_folders
from canopy.training.run_settings import shown
from canopy.training.scoring import headline, plain, score_chips
from canopy.training.settings import FinetuneSettings
from canopy.training.start import describe_start, expect_heights, start_from

MODEL = "model.safetensors"
# What a resumed run may change: how long, on what machine, how it is watched.
FREE = frozenset({"steps", "minutes", "threads", "workers", "device", "log_every", "patience", "compile"})
_THOUSAND = 1000  # the bar's steps


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
    first alone writes. RUN_DIR gets config.yaml (all settings), train.csv, val.csv, TensorBoard events where
    that is installed, last.ckpt, best-STEP.safetensors and model.safetensors.

    Args:
        settings: the whole run.
        run_dir: created.
        resume: continue from RUN_DIR/last.ckpt.
        fast_dev_run: two steps, a validation on two chips and an export, all in a temporary folder: what is
            wrong with a config, its data or its model shows in seconds. RUN_DIR is left alone.
        command: how the run was started, for the card.
        progress: told about the share done, in thousandths.

    Raises:
        ConfigError: RUN_DIR holds a run and `resume` is off, there is nothing to resume, or settings
            were changed.
        DataError, CheckpointError: the chips or the weights to start from cannot be used.
        TrainingError: loss or gradient were not finite too often.
    """
    if fast_dev_run:
        with tempfile.TemporaryDirectory() as folder:
            finetune(_brief(settings), Path(folder) / "run", command=command, progress=progress)
        return run_dir
    device = pick_device(settings.device)
    data = open_data(settings.data, settings.architecture.gsd_m)
    run = _Run(settings, run_dir, data, device, progress or NoProgress())
    with held(run_dir, settings, resume, FREE):
        return run.go(resume, command)


def _brief(settings: FinetuneSettings) -> FinetuneSettings:
    data = settings.data.model_copy(update={"val_chips": 2})
    brief = {"steps": 2, "minutes": None, "validate_every": 1, "log_every": 1, "workers": 0, "data": data}
    return settings.model_copy(update=brief)


class _Run:
    """One call of `finetune`: what happens around the steps."""

    def __init__(
        self,
        settings: FinetuneSettings,
        folder: Path,
        data: TrainingData,
        device: torch.device,
        bar: Progress,
    ) -> None:
        self.settings, self.folder, self.data = settings, folder, data
        self.device, self.bar, self._shown = device, bar, 0
        self.writes = first_process()

    def go(self, resume: bool, command: str) -> Path:
        settings, last = self.settings, self.folder / LAST
        torch.set_num_threads(settings.threads)
        pl.seed_everything(settings.seed, verbose=False)
        model, started = self._fresh_weights(resume)
        stream = batches(settings, self.data)
        # Channels last is how convolutions run fastest, on CPUs and GPUs alike.
        model = model.to(memory_format=torch.channels_last)
        val = self.data.val.some(settings.data.val_chips)
        if self.writes and not len(val):
            log.warning(
                "note: no val chips: nothing is scored, and the last weights are exported as they are"
            )
        module = HeightModule(model, settings, stream, val, self._on_step, self._on_scores)
        if settings.compile:
            compile_parts(model)
        step = _step_of(last) if resume else None
        if self.writes:
            self.train_log = Table(self.folder / "train.csv", step)
            self.val_log = Table(self.folder / "val.csv", step)
            self.bar.start(_THOUSAND, settings.name)
        trainer = self._trainer(step)
        with warnings.catch_warnings():
            # Batches are made whole by the stream; Lightning's advice about loaders does not apply.
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            trainer.fit(module, self._loader(stream), ckpt_path=last if resume else None, weights_only=True)
        self._save(module)
        if self.writes:
            self._export(module, started, command)
        return self.folder / MODEL

    def _fresh_weights(self, resume: bool) -> tuple[HeightModel, dict[str, object]]:
        """A model with random weights of the seed, or those of `init_from`, and what is known of these."""
        model, path = HeightModel(self.settings.architecture), self.settings.init_from
        if not resume:
            if self.settings.loss.expect_heights:
                expect_heights(model, torch.from_numpy(some_heights(self.data.train)))
            if path is not None:
                start_from(model, path, self.settings.init_part)
        return model, describe_start(path) if path is not None else {}

    def _trainer(self, step: int | None) -> pl.Trainer:
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        device, s = self.device, self.settings
        several = s.processes > 1
        return pl.Trainer(
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=[device.index] if device.index is not None else s.devices,
            num_nodes=s.nodes,
            strategy="ddp" if several or s.strategy == "ddp" else "auto",
            sync_batchnorm=several and device.type == "cuda",
            use_distributed_sampler=False,
            precision=self.settings.precision,
            max_steps=self.settings.steps,
            logger=_tensorboard(self.folder, step) if self.settings.tensorboard else False,
            enable_checkpointing=False,
            log_every_n_steps=self.settings.log_every,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )

    def _loader(self, stream: ChipBatches) -> DataLoader[Any]:
        workers = self.settings.workers
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            # A forked child would inherit torch's threads in whatever state they are.
            multiprocessing_context="spawn" if workers else None,
            pin_memory=self.device.type == "cuda",
        )

    def _on_step(self, module: HeightModule, named: dict[str, Tensor], validated: bool) -> None:
        s, step = self.settings, module.global_step
        if validated:
            self._save(module)
        if not self.writes:
            return
        if step % s.log_every == 0 or step == 1:
            row = {k: float(v) for k, v in named.items()}
            self.train_log.add({"step": step, "minutes": module.trained_s / 60, **row})
        now = int(_THOUSAND * module.progress)
        self.bar.advance(now - self._shown)
        self._shown = now

    def _on_scores(self, module: HeightModule, table: Scores, better: bool) -> None:
        step = module.global_step
        if not self.writes:
            return
        for site, row in plain(table).items():
            self.val_log.add({"step": step, "minutes": module.trained_s / 60, "site": site, **row})
        if better and self.settings.exports_best:
            save_checkpoint(self._best_file(step), module.ema, {"name": self.settings.name}, half=False)
        if not table:
            return
        score, seen = headline(table), "seen" if self.data.val_seen else "val"
        log.info(
            "step %d, %.1f min: %s MAE %.2f m, r %.2f, bias %+.2f m%s",
            step, module.trained_s / 60, seen, score["mae_m"], score["r"], score["bias_m"],
            " (best)" if better else "",
        )  # fmt: skip

    def _best_file(self, step: int) -> Path:
        return self.folder / f"best-{step:07d}.safetensors"

    def _save(self, module: HeightModule) -> None:
        """Write last.ckpt whole or not at all, then drop the files of bests that are none any more."""
        part = self.folder / f".{LAST}.part"
        module.trainer.save_checkpoint(part)  # all processes take part, the first writes
        if not self.writes:
            return
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, self.folder / LAST)
        for old in self.folder.glob("best-*.safetensors"):
            if old != self._best_file(module.best.step):
                old.unlink()

    def _export(self, module: HeightModule, started: dict[str, object], command: str) -> None:
        """Write the best or last averaged weights and their card."""
        settings, model = self.settings, module.ema
        best = self._best_file(module.best.step)
        chosen = settings.exports_best and best.is_file()
        if chosen:
            model = load_model(best)
        model = model.float().to(self.device).eval()
        card: dict[str, Any] = {
            "name": settings.name,
            "licence": settings.licence,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": without_folders(command),
            "settings": _shareable(settings),
            "steps": module.global_step,
            "minutes": round(module.trained_s / 60, 1),
            "parameters": model.parameter_count,
            "exported": f"best of the validations, step {module.best.step}" if chosen else "last",
            "data": self.data.facts(),
        }
        if started:
            card["started_from"] = started
        if len(self.data.val):
            table = score_chips(model, self.data.val, crop_px=settings.crop_px, overlap_px=0)
            card["seen" if self.data.val_seen else "val"] = plain(table)
        save_checkpoint(self.folder / MODEL, model, card)


def _step_of(last: Path) -> int:
    try:
        return int(torch.load(last, map_location="cpu", weights_only=True)["global_step"])
    except Exception as error:  # torch names a dozen kinds of damage
        raise ConfigError(f"is no checkpoint ({error})", where=last, remedy="start a new run") from error


def _tensorboard(folder: Path, step: int | None) -> Any:
    from importlib.util import find_spec

    if not find_spec("tensorboard"):
        return False
    from pytorch_lightning.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="", version="tensorboard", purge_step=step)


def _shareable(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings for a card: files by name alone."""
    facts = json.loads(settings.model_dump_json(exclude={"model"}))
    facts["data"]["chips"] = shown(settings.data.chips)
    if settings.init_from:
        facts["init_from"] = settings.init_from.name
    return facts
