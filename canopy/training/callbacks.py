"""What happens around a training's steps: how far it is, bad steps, averaged weights, probes of features.

A probe is a cheap measure of frozen features: ridge regression from patch features to the patch's mean
height, and the features' effective rank, which tells whether the representation is alive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer, WeightAveraging
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import get_total_norm

from canopy.chips.data import evenly
from canopy.chips.store import Chip, ChipShards
from canopy.errors import CanopyError
from canopy.models.height import fill_invalid
from canopy.runtime import Progress, log
from canopy.training.optim import TrainingModule, ema_decay, largest_of_processes

_MOST_ROWS = 1024  # of a singular value decomposition, so that it takes milliseconds
_SIDE_PX = 256  # chips are cropped to this, so that a probe stays a matter of seconds
_LEAST_KNOWN = 0.5  # share of a patch's label pixels
_PENALTY = 0.01  # of the ridge, times the number of rows


class TrainingError(CanopyError):
    """A training that cannot go on. Its last checkpoint is good."""


class Schedule(Timer):
    """Tells the module how far the run is, and ends it.

    Progress is the larger of steps done / steps allowed and minutes run / minutes allowed; the minutes are
    those of all parts of a resumed run, validations included, and of the slowest process.

    Args:
        steps, minutes: allowed; `minutes` None: only the steps count.
        bar: told about per cent of the run.
        what: on the bar.
    """

    def __init__(
        self, steps: int, minutes: float | None, bar: Progress | None = None, what: str = ""
    ) -> None:
        super().__init__(duration=None, interval="step", verbose=False)
        self.steps, self.minutes, self.bar, self.what, self._shown = steps, minutes, bar, what, 0

    def progress(self, trainer: pl.Trainer) -> float:
        """Share of the run that is done, 0..1. All processes must ask."""
        done = trainer.global_step / self.steps
        if self.minutes:
            elapsed = self.time_elapsed() / (60 * self.minutes)
            done = max(done, largest_of_processes(elapsed, trainer.strategy.root_device))
        return min(1.0, done)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = self.progress(trainer) >= 1.0  # a finished run takes no further step
        if self.bar and trainer.is_global_zero:
            self.bar.start(100, f"{self.what}, per cent")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        pl_module.progress = self.progress(trainer)  # type: ignore[assignment]
        pl_module.log("minutes", self.time_elapsed() / 60)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        done = self.progress(trainer)
        # Lightning validates before it stops: the last weights, after the lowest rates, tend to be the best.
        trainer.should_stop = trainer.should_stop or done >= 1.0
        if self.bar and trainer.is_global_zero:
            self.bar.advance(int(100 * done) - self._shown)
            self._shown = int(100 * done)


class NanGuard(pl.Callback):
    """Decides whether a step is taken, and sees that one left out leaves no trace.

    A step is left out where a loss, the gradient's norm (a finite loss may have a gradient that is not) or a
    running statistic is not finite. Two such steps are forgiven (after DINOv2's training loop, which
    tolerates two as well); those longer ago than `memory` steps are forgotten, so that a long run does not
    end for rare accidents. Of several processes all decide alike.

    Raises:
        TrainingError: more than `forgiven` bad steps within `memory` steps.
    """

    def __init__(self, forgiven: int = 2, memory: int = 1000) -> None:
        self.forgiven, self.memory = forgiven, memory
        self.skipped: list[int] = []
        self._kept: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._kept = [buffer.detach().clone() for buffer in pl_module.buffers()]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        pl_module.log("grad_norm", norm)
        values = {name: float(value) for name, value in pl_module.losses.items()} | {"gradient": float(norm)}
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not _all_finite(pl_module.buffers()):
            bad.append("a running statistic is not finite")
        pl_module.left_out = largest_of_processes(float(bool(bad)), norm.device) > 0
        if pl_module.left_out:
            self._leave_out(pl_module, ", ".join(bad) or "another process's values are not finite")

    @torch.no_grad()
    def _leave_out(self, module: TrainingModule, what: str) -> None:
        for buffer, kept in zip(module.buffers(), self._kept, strict=True):
            buffer.copy_(kept)
        for parameter in module.parameters():
            parameter.grad = None  # the optimiser passes over it
        step = module.global_step
        self.skipped = [s for s in self.skipped if s > step - self.memory] + [step]
        if len(self.skipped) > self.forgiven:
            raise TrainingError(
                f"{what} at step {step}, and so it was at {self.skipped[:-1]}",
                remedy="lower lr, or look at the chips of these steps; --resume goes on from last.ckpt",
            )
        log.warning("step %d is left out: %s", step, what)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = [int(s) for s in state_dict["skipped"]]


def _all_finite(buffers: Iterable[Tensor]) -> bool:
    found = [buffer for buffer in buffers if buffer.is_floating_point()]
    return not found or bool(torch.stack(torch._foreach_norm(found, math.inf)).isfinite().all())


class AveragedWeights(WeightAveraging):
    """Lightning's running average of the weights: what is validated, and `state_dict` in checkpoints."""

    def __init__(self, final_decay: float) -> None:
        def average(averaged: Any, current: Any, count: Any) -> None:
            decay = ema_decay(int(count), final_decay)
            if averaged[0].is_floating_point():
                torch._foreach_lerp_(averaged, current, 1.0 - decay)
            else:  # how many batches a norm has seen
                torch._foreach_copy_(averaged, current)

        super().__init__(multi_avg_fn=average)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Both stay what they are: the run may be resumed from a checkpoint that is written after its end."""


# ---- probes of features -----------------------------------------------------------------------------
Patches = tuple[Tensor, np.ndarray]  # image (3, H, W) in 0..1, mean heights (rows * cols) or NaN


class Probe(pl.Callback):
    """Scores frozen features at the start, every so many steps, and at the end.

    Args:
        train, val: images and what their patches should say, to fit on and to score.
        every: steps.

    Attributes:
        scores, at: of the last probe, and its step.
    """

    def __init__(self, train: list[Patches], val: list[Patches], every: int) -> None:
        self.train, self.val, self.every = train, val, every
        self.scores: dict[str, float] = {}
        self.at = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self.run(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.run(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at != trainer.global_step:
            self.run(trainer, pl_module)

    def run(self, trainer: pl.Trainer, module: Any) -> None:
        """Score the module's useful encoder, and log it; the first process alone."""
        self.at = trainer.global_step
        if trainer.is_global_zero:
            encoder = module.useful_encoder()

            def features(image: Tensor) -> Tensor:
                return encoder.tokens(module.normalised(image)).patches[0]

            with torch.autocast(
                module.device.type, torch.bfloat16, enabled=trainer.precision == "bf16-mixed"
            ):
                self.scores = self.score(features, module.device)
            for each in trainer.loggers:
                each.log_metrics({f"probe/{k}": v for k, v in self.scores.items()}, step=self.at)
                each.save()
            log.info("step %d probe: %s", self.at, " ".join(f"{k} {v:.3g}" for k, v in self.scores.items()))

    @torch.no_grad()
    def score(self, features: Any, device: torch.device | str = "cpu") -> dict[str, float]:
        """mae_m and r2 of a ridge on the val chips' patches, mae_constant_m beside it, and the features'
        effective rank; `features` of an image (1, 3, H, W) are (rows * cols, dim)."""
        seen, heights = [], []
        for part in (self.train, self.val):
            rows = torch.cat([features(image[None].to(device)).float().cpu() for image, _ in part])
            truth = np.concatenate([mean for _, mean in part])
            seen.append(rows.numpy().astype(np.float64)[np.isfinite(truth)])
            heights.append(truth[np.isfinite(truth)])
        (fitted, scored), (target, truth) = seen, heights
        guess = ridge(fitted, target, scored)
        return {
            "mae_m": float(np.abs(guess - truth).mean()),
            "r2": float(1 - np.square(guess - truth).mean() / max(truth.var(), 1e-9)),
            "mae_constant_m": float(np.abs(np.median(target) - truth).mean()),
            "rank": effective_rank(torch.from_numpy(scored)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores, self.at = dict(state_dict["scores"]), int(state_dict["at"])


def open_probe(shards: ChipShards, patch: int, chips: int, every: int) -> Probe | None:
    """The probe over the splits train and val of chips, so many of each, spread evenly; None where they have
    no heights. Plots of 20 m and synthetic chips are left out."""
    parts = []
    for split in ("train", "val"):
        wanted = [
            i for i, r in enumerate(shards.rows)
            if r.split == split and r.label_share > 0 and r.kind not in ("neon", "synth")
        ]  # fmt: skip
        found = (_patches(shards[wanted[i]], patch) for i in evenly(len(wanted), chips))
        parts.append([each for each in found if each is not None])
    return Probe(parts[0], parts[1], every) if all(parts) else None


def _patches(chip: Chip, patch: int) -> Patches | None:
    """None where no patch of it is known."""
    h, w = (min(n, _SIDE_PX) // patch * patch for n in chip.rgb.shape[1:])
    if not h or not w:
        return None
    rgb = fill_invalid(chip.rgb[:, :h, :w].astype(np.float32) / 255, chip.image_valid[:h, :w])
    means = patch_means(chip.chm_m[: h // 2, : w // 2], chip.image_valid[:h, :w], patch // 2)
    return (torch.from_numpy(np.ascontiguousarray(rgb)), means.ravel()) if np.isfinite(means).any() else None


def patch_means(height_m: np.ndarray, image_valid: np.ndarray, side: int) -> np.ndarray:
    """Mean height of each patch of `side` x `side` label pixels, (h / side, w / side); NaN where less than
    half of it is known and seen.

    Args:
        height_m: (h, w), NaN = unknown; image_valid: bool (2 h, 2 w).
    """
    h, w = height_m.shape
    known = np.isfinite(height_m) & image_valid.reshape(h, 2, w, 2).all(axis=(1, 3))
    blocks = (h // side, side, w // side, side)
    share = known.reshape(blocks).mean(axis=(1, 3))
    total = np.where(known, height_m, 0).astype(np.float64).reshape(blocks).mean(axis=(1, 3))
    return np.where(share >= _LEAST_KNOWN, total / np.maximum(share, 1e-9), np.nan)


def ridge(features: np.ndarray, target: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Predictions (m,) at `wanted` (m, d) of a ridge regression fitted to (n, d) features and (n,) targets;
    features are standardised, the penalty is a hundredth of their number of rows."""
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-9, std, 1.0)
    x, y = (features - mean) / std, target - target.mean()
    weights = np.linalg.solve(x.T @ x + _PENALTY * len(x) * np.eye(x.shape[1]), x.T @ y)
    return (wanted - mean) / std @ weights + target.mean()


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Spread of features (n, dim) of length 1 over the batch, times sqrt(dim): about 1 where they fill the
    sphere, 0 where they have collapsed to a point (Chen and He 2020, arXiv 2011.10566, section 4.1)."""
    unit = functional.normalize(features.float(), dim=-1)
    return float(unit.std(dim=0).mean() * features.shape[-1] ** 0.5)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2022, arXiv 2210.02885, eq. 2): exp(entropy of the singular values) of (n, dim).

    At least 1, at most min(n, dim); rows beyond 1024 are thinned out evenly.
    """
    step = -(-len(features) // _MOST_ROWS)
    values = torch.linalg.svdvals(features[::step].float().cpu())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))
