"""What both pretext tasks share, as a thin LightningModule: clock, schedules, guard, logs, exact resume."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from canopy.chips.streams import Views
from canopy.models.encoder import Encoder
from canopy.runtime import log
from canopy.training.guard import NanGuard
from canopy.training.optim import layer_factor, layer_of, parameter_groups, set_rates
from canopy.training.pretrain_settings import PretrainSettings
from canopy.training.probe import HeightProbe
from canopy.training.processes import longest
from canopy.training.run_folder import STATE, STATE_FORMAT, saved_state
from canopy.training.schedules import learning_rate, ramp
from canopy.training.sharding import average_rest, clip_norm, shard
from canopy.training.ssl_data import ViewStream, loader
from canopy.training.ssl_monitor import effective_rank, feature_std

Terms = dict[str, Tensor]


class PretrainModule(pl.LightningModule, ABC):
    """Base of `DinoModule` and `MaeModule`; a subclass gives `terms`, `weights`, and `useful_encoder`.

    Progress is the larger of steps done / steps allowed and minutes trained / minutes allowed; every schedule
    is a function of it. What is random in a step (stochastic depth, MAE's masks) is drawn from a generator
    seeded by (seed, step, process), and the views are a function of the step too. So a checkpoint needs no
    generator states, and a run that was killed and resumed gives the weights of one that was not, bit for
    bit on a CPU, unless `minutes` bound it.

    Attributes:
        stream: where views come from; knows how many batches were used.
        probe: measures frozen features, or None.
        probed, probed_at: scores of the last probe, and its step.
        looked_at: class features (n, dim) and patch features (n, dim) of the last step, for the monitor.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: PretrainSettings, stream: ViewStream, probe: HeightProbe | None) -> None:
        super().__init__()
        self.settings, self.stream, self.probe = settings, stream, probe
        self.config = settings.architecture
        self.register_buffer("mean", torch.tensor(self.config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.config.std).view(1, -1, 1, 1), persistent=False)
        self.guard, self._taken = NanGuard(), True
        self.trained_s = 0.0
        self.looked_at: tuple[Tensor, Tensor] | None = None
        self.probed: dict[str, float] = {}
        self.probed_at = -1
        self._tick = self._logged = time.monotonic()
        self._images = 0
        self._losses: Terms = {}
        self._spread = False

    # ---- what a pretext task gives ---------------------------------------------------------------
    @abstractmethod
    def terms(self, views: Views) -> Terms:
        """Losses of a batch by name, unweighted, each a scalar with its gradient."""

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """Weight of each term now."""

    @abstractmethod
    def useful_encoder(self) -> Encoder:
        """The encoder as it would be exported now, in eval mode. All processes must ask."""

    @abstractmethod
    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimiser moves."""

    def before_step(self) -> None:
        """Called with gradients in place, before they are clipped."""

    def after_step(self) -> None:
        """Called after the weights moved."""

    # ---- the run -----------------------------------------------------------------------------------
    @property
    def progress(self) -> float:
        """Share of the run done, 0..1."""
        s = self.settings
        by_time = self.trained_s / (60 * s.minutes) if s.minutes else 0.0
        return min(1.0, max(self.global_step / s.steps, by_time))

    def setup(self, stage: str) -> None:
        self.stream.split(self.global_rank, self.trainer.world_size)

    def configure_model(self) -> None:
        """Spread what is large over the processes, once they have met (strategy fsdp)."""
        if self.settings.strategy == "fsdp" and not self._spread and self.device_mesh is not None:
            shard(self, self.device_mesh["data_parallel"])
            self._spread = True

    def train_dataloader(self) -> DataLoader[Views]:
        return loader(self.stream, self.settings.data.workers, pin=self.device.type == "cuda")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        s, depth = self.settings, self.config.encoder.depth

        def factor(name: str) -> float:
            first = s.patch_lr if layer_of(name, depth) == 0 else 1.0
            return first * layer_factor(name, depth, s.layer_decay)

        groups = parameter_groups(self.trained(), factor)
        return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, weight_decay=0.0)  # see set_rates

    def normalised(self, rgb: Tensor) -> Tensor:
        """RGB (..., 3, H, W) in 0..1 as the encoder wants it."""
        return (rgb - self.mean) / self.std

    def on_train_start(self) -> None:
        self._tick = self._logged = time.monotonic()
        self.trainer.should_stop = self.progress >= 1.0  # a finished run takes no further step
        if self.global_step == 0:
            self.run_probe()

    def on_train_end(self) -> None:
        self.probe_at_last()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        s, progress = self.settings, self.progress
        rate = learning_rate(progress, s.lr, s.lr_end, s.warmup)
        decay = ramp(progress, s.weight_decay, s.weight_decay_end, shape="cosine")
        set_rates(self.trainer.optimizers[0], rate, decay)
        if s.final.share and progress >= 1 - s.final.share:
            self.stream.go_late()
        entropy = np.random.SeedSequence((s.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(entropy.generate_state(1)[0]))

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        self.guard.before(self)
        terms = self.terms(Views(*batch))
        weights = self.weights()
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        self._losses = {f"loss/{k}": v.detach() for k, v in terms.items()} | {"loss": total.detach()}
        self._images += len(batch[0]) * self.trainer.world_size
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here and not in Lightning, because the guard wants to know the norm."""
        if self._spread:
            average_rest(p for _, p in self.trained())
        self.before_step()
        trained, most = [p for _, p in self.trained()], self.settings.clip_norm or math.inf
        clip = clip_norm if self._spread else torch.nn.utils.clip_grad_norm_
        found = {name: float(value) for name, value in self._losses.items()}
        found["gradient"] = float(clip(trained, most))
        self._taken = self.guard.passes(self, self.global_step, **found)
        if self._taken:
            self.log_dict(self._losses)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in on_train_batch_end: checkpoints are written before that hook, and must hold this.
        if self._taken:  # one left out has no gradients: the optimiser did nothing
            self.after_step()
        self.stream.advance()
        self.trained_s += longest(time.monotonic() - self._tick, self.device)
        self._tick = time.monotonic()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        s = self.settings
        if self.global_step % s.log_every == 0:
            self._report()
        if s.probe.every and self.global_step % s.probe.every == 0:
            self.run_probe()
        if self.progress >= 1.0:
            self.trainer.should_stop = True
        self._tick = time.monotonic()  # neither logs nor probes count as training

    def _report(self) -> None:
        now = time.monotonic()
        rate = self._images / max(now - self._logged, 1e-9)
        self._logged, self._images = now, 0
        facts = {"images_per_s": rate, "progress": self.progress, "minutes": self.trained_s / 60}
        facts["lr"] = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        facts["weight_decay"] = max(
            group["weight_decay"] for group in self.trainer.optimizers[0].param_groups
        )
        if self.looked_at is not None:
            names = ("class", "patch")
            facts |= {f"std/{k}": feature_std(x) for k, x in zip(names, self.looked_at, strict=True)}
            facts |= {f"rank/{k}": effective_rank(x) for k, x in zip(names, self.looked_at, strict=True)}
        self.log_dict(facts)
        losses = self.trainer.logged_metrics | self.trainer.callback_metrics
        shown = {k: float(v) for k, v in losses.items() if k.startswith("loss")}
        shown |= {k: v for k, v in facts.items() if k in ("std/class", "rank/patch", "images_per_s")}
        line = " ".join(f"{k} {v:.3g}" for k, v in shown.items())
        self._say(f"step {self.global_step} {self.trained_s / 60:.1f} min: {line}")

    def run_probe(self) -> None:
        """Score the frozen features on the probe's chips, and log it."""
        if self.probe is None or not self.settings.probe.every:
            return
        self.probed_at = self.global_step
        encoder = self.useful_encoder()  # all processes, for their shares
        if self.global_rank:
            return
        scores = self.probe.score(encoder, self.normalised, self.settings.precision)
        self.probed = scores
        for each in self.loggers:
            each.log_metrics({f"probe/{k}": v for k, v in scores.items()}, step=self.global_step)
            each.save()
        line = " ".join(f"{k} {v:.3g}" for k, v in scores.items())
        self._say(f"step {self.global_step} probe: {line}")

    def probe_at_last(self) -> None:
        """Score what will be exported, unless the last probe did."""
        if self.probed_at != self.global_step:
            self.run_probe()

    def _say(self, line: str) -> None:
        if self.global_rank == 0:
            log.info(line)

    # ---- checkpoints -------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {
            "format": STATE_FORMAT,
            "trained_s": self.trained_s,
            "stream": self.stream.state_dict(),
            "guard": self.guard.state_dict(),
            "probed": self.probed,
            "probed_at": self.probed_at,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = saved_state(checkpoint)
        self.trained_s = float(state["trained_s"])
        self.stream.load_state_dict(state["stream"])
        self.guard.load_state_dict(state["guard"])
        self.probed, self.probed_at = dict(state["probed"]), int(state["probed_at"])
