"""Supervised height training as a thin LightningModule: a step, an average of weights, a clock."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional

from canopy.chips.dataset import Sample
from canopy.chips.store import Chip
from canopy.models.height import HeightModel
from canopy.training import height_losses as losses
from canopy.training.schedules import ema_decay, warmup_cosine
from canopy.training.scoring import score_chips
from canopy.training.settings import FinetuneSettings


class HeightModule(pl.LightningModule):
    """Trains `model`, keeps `ema`, the running average of its weights that is validated and exported.

    Progress, and with it the learning rate, is the larger of steps done / steps allowed and minutes trained /
    minutes allowed; minutes are those of all parts of a resumed run.
    """

    def __init__(self, model: HeightModel, settings: FinetuneSettings, val_chips: list[Chip]) -> None:
        super().__init__()
        self.model, self.settings, self.val_chips = model, settings, val_chips
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.trained_s = 0.0
        self._tick = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the run done, 0..1."""
        s = self.settings
        return min(1.0, max(self.global_step / s.steps, self.trained_s / (60.0 * s.minutes)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Norms, biases and other vectors are not decayed, as is usual for transformers.
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.settings.lr, betas=(0.9, 0.99))

    def on_train_start(self) -> None:
        self._tick = time.monotonic()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        factor = warmup_cosine(self.progress, self.settings.warmup)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.settings.lr * factor

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        batch = Sample(*batch)
        height, _, scores = self.model.heights_and_scores(
            batch.rgb.contiguous(memory_format=torch.channels_last)
        )
        # Labels are at 1 m, the image at 0.5 m.
        pred = functional.avg_pool2d(height.float(), 2)
        terms = self._terms(pred, scores.float(), batch)
        total = torch.stack([v for k, v in terms.items() if k != "mae_m"]).sum()
        self.log_dict({k: v.detach() for k, v in terms.items()})
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("progress", self.progress)
        return total

    def _terms(self, pred: Tensor, scores: Tensor, batch: Sample) -> dict[str, Tensor]:
        s, target, weight = self.settings.loss, batch.target, batch.weight
        if s.shift_reach_m and self.progress >= s.shift_after:
            shifts = losses.best_shift(pred, target, weight, s.shift_reach_m, s.shift_penalty_m)
            target, weight = losses.align_labels(target, weight, shifts)
        terms = {"mae_m": losses.weighted_mean((pred - target).abs(), weight)}
        if s.charbonnier:
            terms["charbonnier"] = s.charbonnier * losses.charbonnier(pred, target, weight)
        if s.silog:
            terms["silog"] = s.silog * losses.silog(pred, target, weight)
        if s.gradient:
            terms["gradient"] = s.gradient * losses.gradient_loss(pred, target, weight)
        if s.two_hot:
            if scores.shape[-2:] != target.shape[-2:]:
                scores = functional.interpolate(scores, size=target.shape[-2:], mode="area")
            centres = self.model.centres * self.model.config.decoder.scale
            terms["two_hot"] = s.two_hot * losses.two_hot_loss(scores, target, weight, centres)
        return terms

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        decay = ema_decay(self.global_step, self.settings.ema_final)
        with torch.no_grad():
            for average, value in zip(
                self.ema.state_dict().values(), self.model.state_dict().values(), strict=True
            ):
                if value.is_floating_point():
                    average.lerp_(value, 1.0 - decay)
                else:
                    average.copy_(value)
        now = time.monotonic()
        self.trained_s += now - self._tick
        self._tick = now
        if self.global_step % self.settings.validate_every == 0:
            self.validate()
            self._tick = time.monotonic()  # validation does not count as training
        if self.progress >= 1.0:
            self.trainer.should_stop = True

    def validate(self) -> dict[str, dict[str, float]]:
        """Score the averaged weights on the val chips; logged per site."""
        table = score_chips(self.ema, self.val_chips, crop_px=self.settings.crop_px, overlap_px=0)
        for site, row in table.items():
            short = site.split(",")[0].replace(" ", "_")
            self.log_dict({f"val/{short}/{k}": v for k, v in row.items() if k != "n"})
        overall = table["all but plots"]
        self.print(
            f"step {self.global_step} {self.trained_s / 60:.1f} min: "
            + " ".join(f"{k} {v:.3f}" for k, v in overall.items() if k != "n")
            + " | "
            + " ".join(f"{s[:14]} {r['mae_m']:.2f}" for s, r in table.items())
        )
        return table

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trained_s"] = self.trained_s

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_s = checkpoint["trained_s"]
