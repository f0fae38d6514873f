"""What both pretext tasks share, as a thin LightningModule: clock, schedules, guard, logs, exact resume.

DINOv2 (Oquab et al. 2023, arXiv 2304.07193): a student learns to predict its own running average.

Masked autoencoding (He et al. 2021, arXiv 2111.06377) of the same encoder: the second pretext task.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from canopy.chips.data import Views
from canopy.models.config import ModelConfig
from canopy.models.encoder import Encoder, Tokens
from canopy.runtime import log
from canopy.training import losses
from canopy.training.callbacks import HeightProbe, NanGuard, effective_rank, feature_std
from canopy.training.optim import (
    average_rest,
    clip_norm,
    follow,
    layer_factor,
    layer_of,
    learning_rate,
    parameter_groups,
    ramp,
    set_rates,
    shard,
    share_buffers,
    whole_state,
)
from canopy.training.run_folder import STATE, STATE_FORMAT, longest, saved_state
from canopy.training.settings import DinoSettings, PretrainSettings
from canopy.training.ssl_data import ViewStream, loader
from canopy.training.ssl_heads import PixelDecoder, PrototypeHead

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


class Network(nn.Module):
    """An encoder with its two heads: what student and teacher both are."""

    def __init__(self, config: ModelConfig, settings: DinoSettings, drop_path: float) -> None:
        super().__init__()
        dim, shape = config.encoder.dim, (settings.hidden, settings.bottleneck)
        self.encoder = Encoder(replace(config.encoder, drop_path=drop_path), len(config.bands))
        # Encoders without a final norm of their own get one that belongs to the heads.
        self.norm = nn.Identity() if config.encoder.norm_taps else nn.LayerNorm(dim)
        self.class_head = PrototypeHead(dim, settings.class_prototypes, *shape)
        self.patch_head = PrototypeHead(dim, settings.patch_prototypes, *shape)

    def forward(self, x: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """The encoder's tokens, normalised; see `Encoder.tokens`."""
        tokens = self.encoder.tokens(x, mask, mask_token)
        return Tokens(self.norm(tokens.class_token), self.norm(tokens.patches))


class Targets(NamedTuple):
    """The teacher's word, without gradients.

    Attributes:
        views: probabilities (globals, B, class prototypes); patches: (masked, patch prototypes).
        class_tokens: (globals * B, dim); patch_tokens: (globals * B, patches, dim).
    """

    views: Tensor
    patches: Tensor
    class_tokens: Tensor
    patch_tokens: Tensor


class DinoModule(PretrainModule):
    """Student, EMA teacher, DINO on class tokens, iBOT on masked patches, KoLeo, optional Gram anchoring.

    The teacher runs in training mode. It has no stochastic depth, so that only means that a stem's batch
    norms use the statistics of the batch, and keep running ones of whole views, which the export needs.
    """

    centre_class: Tensor
    centre_patch: Tensor
    anchor_ready: Tensor

    def __init__(self, settings: PretrainSettings, stream: ViewStream, probe: HeightProbe | None) -> None:
        super().__init__(settings, stream, probe)
        dino = settings.dino
        self.student = Network(self.config, dino, self.config.encoder.drop_path)
        self.mask_token = nn.Parameter(torch.zeros(self.config.encoder.dim))
        self.teacher = Network(self.config, dino, 0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.anchor: Encoder | None = None
        if dino.gram.weight:
            self.anchor = Encoder(self.teacher.encoder.config, len(self.config.bands)).requires_grad_(False)
        self.register_buffer("anchor_ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("centre_class", torch.zeros(1, dino.class_prototypes))
        self.register_buffer("centre_patch", torch.zeros(1, dino.patch_prototypes))

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        yield from self.student.named_parameters()
        yield "mask_token", self.mask_token

    def weights(self) -> dict[str, float]:
        d = self.settings.dino
        return {"dino": d.dino_weight, "ibot": d.ibot_weight, "koleo": d.koleo_weight, "gram": d.gram.weight}

    # ---- one step ------------------------------------------------------------------------------------
    def terms(self, views: Views) -> Terms:
        B, globals_ = views.wide.shape[:2]
        # View by view: (views * B, 3, H, W). Masks are random, so any order of them will do.
        wide, near = (self.normalised(x).transpose(0, 1).flatten(0, 1) for x in (views.wide, views.near))
        mask = views.masks.flatten(1)
        targets = self._teach(wide, mask, globals_)
        self.looked_at = targets.class_tokens, targets.patch_tokens.flatten(0, 1)
        first, patches = self.student(wide, mask, self.mask_token)
        scores = [self.student.class_head(first)]
        if len(near):
            scores.append(self.student.class_head(self.student(near).class_token))
        d = self.settings.dino
        every = torch.cat(scores).unflatten(0, (-1, B))  # (views, B, prototypes)
        out = {"dino": losses.dino_loss(every, targets.views, d.student_temperature)}
        hidden = self.student.patch_head(patches[mask])
        image = mask.nonzero()[:, 0]
        out["ibot"] = losses.ibot_loss(hidden, targets.patches, image, len(wide), d.student_temperature)
        # DINOv2 sums over the views.
        out["koleo"] = torch.stack([losses.koleo_loss(x) for x in first.split(B)]).sum()
        if self.anchor is not None and bool(self.anchor_ready):
            out["gram"] = losses.gram_loss(patches, self._anchored(wide))
        return out

    @torch.no_grad()
    def _teach(self, wide: Tensor, mask: Tensor, globals_: int) -> Targets:
        first, patches = self.teacher(wide)
        of_views = self.teacher.class_head(first)
        of_patches = self.teacher.patch_head(patches[mask])
        views = self._targets(of_views, self.centre_class)
        return Targets(
            views.unflatten(0, (globals_, -1)), self._targets(of_patches, self.centre_patch), first, patches
        )

    def _targets(self, scores: Tensor, centre: Tensor) -> Tensor:
        d = self.settings.dino
        temperature = ramp(
            self.progress, d.teacher_temperature_start, d.teacher_temperature, end=d.temperature_warmup
        )
        if d.centring == "sinkhorn":
            return losses.sinkhorn(scores, temperature)
        out = losses.centred_softmax(scores, centre, temperature)
        centre.copy_(losses.updated_centre(centre, scores))
        return out

    @torch.no_grad()
    def _anchored(self, wide: Tensor) -> Tensor:
        assert self.anchor is not None
        return self.anchor.eval().tokens(wide).patches

    # ---- around it -----------------------------------------------------------------------------------
    def before_step(self) -> None:
        if self.progress < self.settings.dino.freeze_last:
            for head in (self.student.class_head, self.student.patch_head):
                head.prototypes.grad = None

    def after_step(self) -> None:
        d = self.settings.dino
        follow(self.teacher, self.student, ramp(self.progress, d.momentum, d.momentum_end, shape="cosine"))
        if self.anchor is None or self.progress < d.gram.after:
            return
        every = d.gram.renew_every
        if not self.anchor_ready or (every and self.global_step % every == 0):
            self.anchor.load_state_dict(self.teacher.encoder.state_dict())
            share_buffers(self.anchor)  # it works with its running statistics, which must be the same for all
            self.anchor_ready.fill_(True)

    def useful_encoder(self) -> Encoder:
        encoder = Encoder(self.config.encoder, len(self.config.bands))
        encoder.load_state_dict(whole_state(self.teacher.encoder))
        return encoder.to(self.device).eval()


_NORM_BATCHES = 8


class MaeModule(PretrainModule):
    """Hide most patches, encode the rest, let a light decoder paint the hidden pixels.

    Hidden tokens are dropped, so the transformer sees a quarter of them, with their own positions. A
    convolutional stem still runs over the whole image, hidden patches blanked. Statistics of such images
    would be mostly those of blanks, and later ones of whole images would not fit the weights; so in each step
    the stem's batch norms take (as constants) what they measure on the same images unmasked, and for the
    probe and the export what they measure on some batches of them.
    """

    def __init__(self, settings: PretrainSettings, stream: ViewStream, probe: HeightProbe | None) -> None:
        super().__init__(settings, stream, probe)
        e, m = self.config.encoder, settings.mae
        self.encoder = Encoder(e, len(self.config.bands))
        self.norm = nn.Identity() if e.norm_taps else nn.LayerNorm(e.dim)
        self.decoder = PixelDecoder(e.dim, m.width, m.depth, m.heads, e.patch**2 * len(self.config.bands))

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.named_parameters()

    def weights(self) -> dict[str, float]:
        return {"mae": 1.0}

    def terms(self, views: Views) -> Terms:
        rgb = views.wide[:, 0]
        patch = self.config.patch_px
        grid = rgb.shape[-2] // patch, rgb.shape[-1] // patch
        m, x = self.settings.mae, self.normalised(rgb)
        keep, mask = random_masks(len(rgb), grid, m.mask, m.unit, rgb.device)
        if self.encoder.stem is not None:
            measure_norms(self.encoder.stem, [x])
            self.encoder.stem.eval()
        tokens = self.encoder.tokens(x, mask=mask, keep=keep)
        visible = self.norm(tokens.patches)
        self.looked_at = tokens.class_token.detach(), visible.detach().flatten(0, 1)
        predicted = self.decoder(visible, keep, grid)
        return {"mae": losses.mae_loss(predicted, rgb, mask, patch)}

    @torch.no_grad()
    def useful_encoder(self) -> Encoder:
        encoder = Encoder(self.config.encoder, len(self.config.bands)).to(self.device)
        encoder.load_state_dict(whole_state(self.encoder))
        if encoder.stem is not None:
            wide = [self.stream.make(i).wide[:, 0].to(self.device) for i in range(_NORM_BATCHES)]
            measure_norms(encoder.stem, [self.normalised(x) for x in wide])
        return encoder.eval()


def random_masks(
    count: int, grid: tuple[int, int], share: float, unit: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What to keep, drawn in squares of `unit` x `unit` patches of a grid (rows, cols); at least one square.

    Returns:
        Patch numbers (count, k), rising, and masks (count, rows * cols), True = hidden.

    Raises:
        ValueError: the grid does not divide into such squares.
    """
    rows, cols = grid
    if rows % unit or cols % unit:
        raise ValueError(f"{rows} x {cols} patches do not divide into squares of {unit}")
    squares = rows // unit * (cols // unit)
    kept = max(1, squares - round(share * squares))
    # Drawn on the CPU: the same masks whatever the device.
    chosen = torch.rand(count, squares).argsort(dim=1)[:, :kept]
    hidden = torch.ones(count, squares, dtype=torch.bool).scatter(1, chosen, False)
    hidden = hidden.reshape(count, rows // unit, cols // unit)
    mask = hidden.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1).to(device)
    return (~mask).nonzero()[:, 1].reshape(count, -1), mask


@torch.no_grad()
def measure_norms(module: nn.Module, images: Sequence[Tensor]) -> None:
    """Set the running statistics of all batch norms to the mean over these batches of images."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    was_training = module.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    module.train()
    for image in images:
        module(image)
    module.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
