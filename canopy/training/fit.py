"""Run a pretraining: data, probe, trainer, resume, logs, export. RUN_DIR holds all it takes to repeat it.

Where the weights of a new run come from: a pretrained encoder, a model file, or an earlier run.

Run a training: data, trainer, resume, log, export. RUN_DIR holds all a reader needs to repeat it.

Scores of a model beside its baselines, as data for the checkpoint's card and as the model card's text.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.utils.data import DataLoader

from canopy.chips.data import ChipBatches
from canopy.chips.store import Chip
from canopy.errors import CheckpointError, ConfigError
from canopy.files import replacing
from canopy.models.checkpoint import load_model, load_strict, save_checkpoint
from canopy.models.encoder import Encoder
from canopy.models.height import HeightModel
from canopy.runtime import NoProgress, Progress, log, pick_device
from canopy.training.callbacks import HeightProbe, open_probe
from canopy.training.data import TrainingData, batches, open_data, some_heights, split_chips
from canopy.training.height import HeightModule, Scores
from canopy.training.optim import compile_parts
from canopy.training.run_folder import LAST, Table, first_process, held, without_folders
from canopy.training.scoring import Table as Table_scoring
from canopy.training.scoring import fit_baselines, headline, plain, predict_chip, score, score_chips
from canopy.training.settings import FinetuneSettings, PretrainSettings, shown
from canopy.training.ssl import DinoModule, MaeModule, PretrainModule
from canopy.training.ssl_data import ViewStream, open_stream

ENCODER = "encoder.safetensors"
# What a resumed run may change: how long, on what machine, how it is watched.
PRETRAIN_FREE = frozenset(
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
    with held(run_dir, settings, resume, PRETRAIN_FREE):
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


ENCODER_FILE = "encoder."
_FIXED = ("mean", "std", "centres")  # buffers that the new run's own config decides


def start_from(model: HeightModel, path: Path, part: str = "auto") -> str:
    """Load weights into `model`, strictly: every tensor of the part fits, or nothing is loaded.

    Args:
        model: changed in place.
        path: a safetensors file (a pretraining's `encoder.safetensors`, or a model file), or a run's
            `last.ckpt` (its averaged weights).
        part: 'encoder', 'all', or 'auto': all that the file has, whole encoder or whole model.

    Returns:
        'encoder' or 'all', what was loaded.

    Raises:
        CheckpointError: no such file, damaged, or keys and shapes that differ (they are named).
    """
    found = {k: v for k, v in _read(path).items() if k not in _FIXED}
    inside = {k: v for k, v in found.items() if k.startswith(ENCODER_FILE)}
    if not inside:
        raise CheckpointError(
            "holds no encoder", where=path, expected="tensors named encoder.*", remedy="name another file"
        )
    if part == "auto":
        part = "encoder" if len(inside) == len(found) else "all"
    _same_normalisation(model, path)
    if part == "encoder":
        load_strict(model.encoder, {k.removeprefix(ENCODER_FILE): v for k, v in inside.items()}, path)
    else:
        own = {k: v for k, v in model.state_dict().items() if k in _FIXED}
        load_strict(model, {**found, **own}, path)
    log.info("%s of %s: %d tensors", "encoder" if part == "encoder" else "all", path.name, len(inside))
    return part


def _same_normalisation(model: HeightModel, path: Path) -> None:
    """A pretrained encoder says what its images were normalised with: other constants would shift them."""
    said = _header(path)
    for name in ("mean", "std"):
        theirs, ours = json.loads(said.get(name, "null")), list(getattr(model.config, name))
        if theirs is not None and theirs != ours:
            raise CheckpointError(
                f"was trained on images of {name} {theirs}, the model has {ours}",
                where=path,
                remedy=f"set model.{name} to what the encoder knows",
            )


def _header(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; a run's checkpoint has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError("no such file", where=path, expected="a safetensors file or a last.ckpt")
    if path.suffix == ".ckpt":
        return _read_run(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged or no safetensors file ({error})", where=path) from error
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _read_run(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a fine-tuning run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # damaged bytes make torch's reader stumble in a dozen ways
        raise CheckpointError(f"is no checkpoint of a run ({error})", where=path) from error
    return {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}


@torch.no_grad()
def expect_heights(model: HeightModel, heights_m: Tensor) -> None:
    """Let a fresh model predict the distribution of `heights_m` (n,) everywhere, before it has seen anything.

    Fresh softmax bins are all alike, and their mean is half the highest bin: hundreds of steps would
    go into unlearning 25 m. So the last layer's bias becomes the logarithm of how often each bin is nearest.
    Other heads (weights 'relu') are left as they are.
    """
    config, last = model.config.decoder, model.decoder.head.conv3
    if config.weights != "softmax" or last.bias is None or not len(heights_m):
        return
    centres = model.centres.cpu() * config.scale
    edges = (centres[1:] + centres[:-1]) / 2
    counts = torch.bincount(torch.bucketize(heights_m.cpu(), edges), minlength=config.bins).float()
    share = (counts + 1e-3 * counts.sum()) / (1 + 1e-3 * config.bins) / counts.sum()
    last.bias.copy_(share.log() - share.log().mean())
    last.weight.mul_(0.1)  # or random scores would drown it


def describe_start(path: Path) -> dict[str, object]:
    """What a safetensors file says about itself, for the card of the model that starts from it."""
    try:
        card = json.loads(_header(path).get("card", "{}"))
    except ValueError:
        card = {}
    card = {k: v for k, v in card.items() if isinstance(v, (str, int, float))}
    if "command" in card:
        card["command"] = without_folders(str(card["command"]))
    return {"file": path.name, **card}


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


OVERLAP_PX = 64


def score_with_baselines(
    model: HeightModel, chips: Path, splits: tuple[str, ...]
) -> dict[str, dict[str, Table_scoring]]:
    """Score the model and both baselines on the same pixels of each split.

    Args:
        model: predicts with crops of `model.config.crop_px`.
        chips: a folder of `canopy data chips`.
        splits: those without chips are left out.

    Returns:
        split -> {'model', 'training_mean', 'ridge'} -> site -> the row of `scoring.score`. A score that does
        not exist (the correlation of a constant) is None.
    """
    baselines = fit_baselines(split_chips(chips, "train"))

    def by_model(chip: Chip) -> np.ndarray:
        return predict_chip(model, chip, model.config.crop_px, OVERLAP_PX)

    predictors: dict[str, Callable[[Chip], np.ndarray]] = {
        "model": by_model,
        "training_mean": baselines.constant,
        "ridge": baselines.regression,
    }
    found = {split: split_chips(chips, split) for split in splits}
    return {
        split: {name: plain(score(part, p)) for name, p in predictors.items()}
        for split, part in found.items()
        if len(part)
    }


def markdown_table(scores: dict[str, Table_scoring]) -> str:
    """One split's scores as a Markdown table, a row per site."""
    lines = [
        "| site | pixels | MAE m | r | R2 | block R2 | edge error | bias m | MAE training mean | MAE ridge "
        "| r ridge |",
        f"|---|{'---:|' * 10}",
    ]
    for site, row in scores["model"].items():
        mean, ridge = scores["training_mean"][site], scores["ridge"][site]
        cells = [site, f"{row['n']:,}", f"**{_number(row['mae_m'])}**"]
        cells += [_number(row.get(name)) for name in ("r", "r2", "block_r2", "edge_error")]
        cells += [
            f"{row['bias_m']:+.2f}",
            _number(mean["mae_m"]),
            _number(ridge["mae_m"]),
            _number(ridge["r"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def height_table(scores: dict[str, Table_scoring]) -> str:
    """Bias by measured height of every predictor, over all sites without plots; '' for older cards."""
    rows = {name: headline(table) for name, table in scores.items()}
    bins = [k for k in rows["model"] if k.startswith("bias_") and k != "bias_m"]
    if not bins:
        return ""
    heads = [k.removeprefix("bias_").removesuffix("_m") + " m" for k in bins]
    lines = [f"| bias, metres | {' | '.join(heads)} |", f"|---|{'---:|' * len(bins)}"]
    for name, row in rows.items():
        cells = ["-" if row[k] is None else f"{row[k]:+.1f}" for k in bins]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def model_card(facts: dict[str, Any]) -> str:
    """docs/model-card.md from `canopy.models.checkpoint.describe`; by code, so that it cannot drift."""
    card = facts["card"]
    scores, data = card.get("scores", {}), card["data"]
    parts = [
        f"# {card['name']}",
        "Canopy height in metres from RGB aerial imagery at "
        f"{facts['gsd_m']} m. Written by `pipelines/score_pack.py`; do not edit.",
        "## Facts",
        "\n".join(
            [
                f"- parameters: {facts['parameters'] / 1e6:.1f} M; file {facts['bytes'] / 1e6:.1f} MB (fp16)",
                f"- licence: {card['licence']}",
                f"- trained: {card['date']}, {card['minutes']} minutes, {card['steps']} steps on "
                f"{card.get('hardware', 'one machine')}",
                f"- command: `{card['command']}` at commit {card.get('commit', 'not recorded')}",
                f"- data: {data.get('train_chips', len(data['train_ids']))} training and "
                f"{data.get('val_chips', len(data['val_ids']))} validation chips, "
                f"sha256 of the chips' sources `{data['sha256'][:16]}`",
                f"- input: {', '.join(facts['bands'])} in 0..1, crops of {facts['crop_px']} px",
                f"- {card.get('data_note', '')}",
            ]
        ),
    ]
    titles = {
        "val": "Validation rows (used for choosing; close to the training tiles in space)",
        "test": "Test rows (a site without training tiles, and the south of another)",
        "test_hard": "Hard test rows (autumn, half leaf-off; reported apart)",
    }
    for split, title in titles.items():
        if split in scores:
            parts += [f"## {title}", markdown_table(scores[split])]
            parts += [table] if (table := height_table(scores[split])) else []
    parts += [
        "Every row counts the same pixels for all columns: 1 m cells with both image and lidar. The ridge "
        "regression sees colour, greenness and texture in 3, 9 and 21 m windows, with all their products.",
        "## Limits",
        card.get("limits", ""),
    ]
    return "\n\n".join(parts) + "\n"
