"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193): a student learns to predict its own running average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from canopy.chips.streams import Views
from canopy.models.config import ModelConfig
from canopy.models.encoder import Encoder, Tokens
from canopy.training import ssl_losses as losses
from canopy.training.optim import follow
from canopy.training.pretrain import PretrainModule, Terms
from canopy.training.pretrain_settings import DinoSettings, PretrainSettings
from canopy.training.probe import HeightProbe
from canopy.training.schedules import ramp
from canopy.training.sharding import share_buffers, whole_state
from canopy.training.ssl_data import ViewStream
from canopy.training.ssl_heads import PrototypeHead


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
