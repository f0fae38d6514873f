"""Supervised height training as a thin LightningModule: a step, averaged weights, a clock, the best yet."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional

from canopy.chips.data import ChipBatches, Sample
from canopy.chips.store import Chip
from canopy.models.decoder import bin_weights
from canopy.models.height import HeightModel
from canopy.training import losses
from canopy.training.callbacks import NanGuard
from canopy.training.losses import footprint_loss
from canopy.training.optim import ema_decay, layer_factor, learning_rate, parameter_groups, set_rates
from canopy.training.run_folder import (
    STATE,
    STATE_FORMAT,
    distributed,
    longest,
    mean_of_processes,
    saved_state,
)
from canopy.training.scoring import headline, score_chips
from canopy.training.settings import FinetuneSettings, weight_at

_LAST_RATE = 0.01  # the learning rate at the end, as a share of its peak
Scores = dict[str, dict[str, float]]


@dataclass
class Best:
    """The best validation yet: its MAE, its step, and validations since without a better one."""

    mae_m: float = float("inf")
    step: int = -1
    waited: int = 0


class Output(NamedTuple):
    """What a model says about a batch, on the label grid: heights (B, 1, h, w) in metres, bin scores."""

    height_m: Tensor
    scores: Tensor


class HeightModule(pl.LightningModule):
    """Trains `model`, keeps `ema`, the running average of its weights that is validated and exported.

    Progress, and with it the learning rate, is the larger of steps done / steps allowed and minutes trained /
    minutes allowed; minutes are those of all parts of a resumed run. The random numbers of a step (stochastic
    depth) are a function of seed, batch number and process alone, so that a resumed run draws the same.

    Of several processes each has its own part of every batch and of every validation; gradients, logged
    values, scores and the clock are those of all, so that all hold the same weights and take the same steps.

    Args:
        model: to train.
        settings: of the run.
        stream: batches; its position is part of the checkpoint.
        val_chips: whole chips to validate on; may be empty.
        on_step: called after every step with the module, what is to be logged, and whether it was validated.
        on_scores: called after every validation with the module, the table, and whether it is the best.
    """

    def __init__(
        self,
        model: HeightModel,
        settings: FinetuneSettings,
        stream: ChipBatches,
        val_chips: Iterable[Chip],
        on_step: Callable[[HeightModule, dict[str, Tensor], bool], None] | None = None,
        on_scores: Callable[[HeightModule, Scores, bool], None] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # the guard decides whether a step is taken
        self.model, self.settings, self.stream, self.val_chips = model, settings, stream, val_chips
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.on_step, self.on_scores = on_step, on_scores
        self.guard, self.best = NanGuard(), Best()
        self.trained_s = 0.0
        self._tick = time.monotonic()
        model.train()
        if settings.freeze_encoder:
            model.encoder.requires_grad_(False).eval()

    @property
    def progress(self) -> float:
        """Share of the run done, 0..1."""
        s = self.settings
        timed = self.trained_s / (60.0 * s.minutes) if s.minutes else 0.0
        return min(1.0, max(self.global_step / s.steps, timed))

    @property
    def out_of_patience(self) -> bool:
        """Whether too many validations have passed without a better one."""
        return 0 < self.settings.patience <= self.best.waited

    def configure_optimizers(self) -> torch.optim.Optimizer:
        s = self.settings

        def factor(name: str) -> float:
            scale = s.encoder_lr_scale if name.startswith("encoder.") else 1.0
            return scale * layer_factor(name, s.architecture.encoder.depth, s.layer_decay)

        groups = parameter_groups(self.model.named_parameters(), factor)
        return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.99), weight_decay=0.0)  # see set_rates

    def setup(self, stage: str) -> None:
        self.stream.split(self.global_rank, self.trainer.world_size)

    def on_train_start(self) -> None:
        self._tick = time.monotonic()
        self.trainer.should_stop = self.progress >= 1.0 or self.out_of_patience

    def training_step(self, batch: Sample, batch_idx: int) -> None:
        s, optimizer = self.settings, self.optimizers()
        torch.manual_seed((s.seed * 1_000_003 + self.stream.position + (self.global_rank << 40)) % 2**63)
        rate = learning_rate(self.progress, s.lr, _LAST_RATE * s.lr, s.warmup, s.lr_schedule)
        set_rates(optimizer, rate, s.weight_decay)  # type: ignore[arg-type]
        self.guard.before(self.model)
        terms, mae = self.terms(Sample(*batch))
        total = torch.stack(list(terms.values())).sum()
        named = _of_all({"loss": total, "mae_m": mae, **terms})
        with torch.autocast(self.device.type, enabled=False):  # mixed precision is for the forward pass
            optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
            self.manual_backward(total)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, s.clip_norm)
            found = {"loss": float(named["loss"]), "gradient": float(norm)}
            stepped = self.guard.passes(self.model, self.stream.position, **found)
            if stepped:
                optimizer.step()  # type: ignore[union-attr]
                self._average()
        self.stream.advance()
        self.log_dict(named | {"lr": rate, "grad_norm": norm, "progress": self.progress})
        self._after(stepped, named | {"lr": torch.tensor(rate), "grad_norm": norm})

    def output(self, rgb: Tensor) -> Output:
        """Predict rgb (B, 3, S, S) on the label grid (B, 1, S/2, S/2), whose pixels have twice the side."""
        height, _, scores = self.model.heights_and_scores(rgb.contiguous(memory_format=torch.channels_last))
        return Output(functional.avg_pool2d(height.float(), 2), scores.float())

    def terms(self, batch: Sample) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted loss terms by name, those of weight 0 left out, and the batch's plain MAE in metres."""
        s, (pred, scores) = self.settings.loss, self.output(batch.rgb)
        target, weight = batch.target, batch.weight
        if s.shift_reach_m and self.progress >= s.shift_after:
            side_m = 2 * self.model.config.gsd_m  # of a label pixel
            reach = round(s.shift_reach_m / side_m)
            shifts = losses.best_shift(pred, target, weight, reach, s.shift_penalty_m * side_m)
            target, weight = losses.align_labels(target, weight, shifts)
        mae = losses.weighted_mean((pred - target).abs().detach(), weight)
        weight = weight * losses.height_factor(target, s.height_weight)
        centres = self.model.centres * self.model.config.decoder.scale
        by_name: dict[str, Callable[[], Tensor]] = {
            "charbonnier": lambda: losses.charbonnier(pred, target, weight),
            "l1": lambda: losses.l1(pred, target, weight),
            "silog": lambda: losses.silog(pred, target, weight),
            "gradient": lambda: losses.gradient_loss(pred, target, weight),
            "two_hot": lambda: losses.two_hot_loss(
                self._bins(scores, pred).clamp_min(1e-9).log(), target, weight, centres
            ),
            "ranked": lambda: losses.ranked_loss(self._bins(scores, pred), target, weight, centres),
            "footprint": lambda: footprint_loss(
                pred,
                batch.shots,
                top=s.footprint_top,
                reach_m=s.footprint_reach_m,
                penalty=s.footprint_penalty,
            ),
        }
        wanted = {name: weight_at(getattr(s, name), self.progress) for name in by_name}
        return {name: wanted[name] * term() for name, term in by_name.items() if wanted[name]}, mae

    def _bins(self, scores: Tensor, like: Tensor) -> Tensor:
        """Bin weights (B, bins, h, w) on the label grid."""
        weights = bin_weights(scores, self.model.config.decoder)
        if weights.shape[-2:] != like.shape[-2:]:
            weights = functional.interpolate(weights, size=like.shape[-2:], mode="area")
        return weights

    @torch.no_grad()
    def _average(self) -> None:
        decay = ema_decay(self.global_step, self.settings.ema_final)
        for average, value in zip(
            self.ema.state_dict().values(), self.model.state_dict().values(), strict=True
        ):
            if value.is_floating_point():
                average.lerp_(value, 1.0 - decay)
            else:
                average.copy_(value)

    def _after(self, stepped: bool, named: dict[str, Tensor]) -> None:
        self.trained_s += longest(time.monotonic() - self._tick, self.device)
        # The last step is validated too: its weights, after the lowest learning rates, tend to be the best.
        due = stepped and (self.global_step % self.settings.validate_every == 0 or self.progress >= 1.0)
        if due:
            self.validate()
        if stepped and self.on_step:
            self.on_step(self, named, due)
        if self.progress >= 1.0 or self.out_of_patience:
            self.trainer.should_stop = True
        self._tick = time.monotonic()  # validation and writing do not count as training

    def validate(self) -> Scores:
        """Score the averaged weights on the val chips, and note whether they are the best yet."""
        table = score_chips(
            self.ema,
            self.val_chips,
            crop_px=self.settings.crop_px,
            overlap_px=0,
            bf16=self.settings.precision == "bf16-mixed",
            together=True,
        )
        mae = headline(table)["mae_m"] if table else float("inf")
        better = mae < self.best.mae_m
        self.best = Best(mae, self.global_step) if better else Best(
            self.best.mae_m, self.best.step, self.best.waited + 1
        )  # fmt: skip
        for site, row in table.items():
            self.log_dict({f"val/{site}/{k}": row[k] for k in ("mae_m", "r", "bias_m")})
        if self.on_scores:
            self.on_scores(self, table, better)
        return table

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {
            "format": STATE_FORMAT,
            "trained_s": self.trained_s,
            "stream": self.stream.state_dict(),
            "guard": self.guard.state_dict(),
            "best": asdict(self.best),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = saved_state(checkpoint)
        self.trained_s = float(state["trained_s"])
        self.stream.load_state_dict(state["stream"])
        self.guard.load_state_dict(state["guard"])
        self.best = Best(**state["best"])


def _of_all(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars as means over all processes, without gradient."""
    if not distributed():
        return {name: value.detach() for name, value in values.items()}
    means = mean_of_processes(torch.stack([value.detach().float() for value in values.values()]))
    return dict(zip(values, means, strict=True))
