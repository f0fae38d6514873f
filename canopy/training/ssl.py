"""Self-supervised pretraining of the encoder, two pretext tasks.

DINOv2 (Oquab et al. 2023, arXiv 2304.07193): a student learns to predict its own running average.
Masked autoencoding (He et al. 2021, arXiv 2111.06377): a light decoder paints what was hidden.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from canopy.models.config import ModelConfig
from canopy.models.encoder import Encoder, Tokens
from canopy.runtime import log
from canopy.training import ssl_losses as losses
from canopy.training.callbacks import effective_rank, feature_std
from canopy.training.optim import (
    TrainingModule,
    follow,
    layer_factor,
    layer_of,
    learning_rate,
    parameter_groups,
    ramp,
)
from canopy.training.settings import DinoSettings, PretrainSettings
from canopy.training.ssl_data import Views, ViewStream

Terms = dict[str, Tensor]
_NORM_BATCHES = 8


class PretrainModule(TrainingModule):
    """Base of `DinoModule` and `MaeModule`; a subclass gives `terms`, `trained` and `useful_encoder`.

    Views are a function of the step, as all that is random: unless `minutes` bound it, a run that was killed
    and resumed gives the weights of one that was not, bit for bit on a CPU.

    Attributes:
        stream: where views come from.
        looked_at: class features (n, dim) and patch features (n, dim) of the last step, for the log.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: PretrainSettings, stream: ViewStream) -> None:
        super().__init__(settings.seed)
        self.settings, self.stream = settings, stream
        self.config = settings.architecture
        self.register_buffer("mean", torch.tensor(self.config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.config.std).view(1, -1, 1, 1), persistent=False)
        self.weights: dict[str, float] = {}  # of the terms; 1 where nothing is said
        self.looked_at: tuple[Tensor, Tensor] | None = None
        self._logged, self._images = time.monotonic(), 0

    # ---- what a pretext task gives ---------------------------------------------------------------
    @abstractmethod
    def terms(self, views: Views) -> Terms:
        """Losses of a batch by name, each a scalar with its gradient; the log has them unweighted."""

    @abstractmethod
    def useful_encoder(self) -> Encoder:
        """The encoder as it would be exported now, in eval mode."""

    @abstractmethod
    def encoders(self) -> Iterable[Encoder]:
        """Every encoder that starts from `model.encoder.init`."""

    @abstractmethod
    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimiser moves."""

    def after_step(self) -> None:
        """Called after the weights moved."""

    # ---- the run -----------------------------------------------------------------------------------
    def configure_optimizers(self) -> torch.optim.Optimizer:
        s, depth = self.settings, self.config.encoder.depth

        def factor(name: str) -> float:
            first = s.patch_lr if layer_of(name, depth) == 0 else 1.0
            return first * layer_factor(name, depth, s.layer_decay)

        groups = parameter_groups(self.trained(), factor)
        return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, weight_decay=0.0)

    def rates(self) -> tuple[float, float]:
        s = self.settings
        rate = learning_rate(self.progress, s.lr, s.lr_end, s.warmup)
        return rate, ramp(self.progress, s.weight_decay, s.weight_decay_end, shape="cosine")

    def normalised(self, rgb: Tensor) -> Tensor:
        """RGB (..., 3, H, W) in 0..1 as the encoder wants it."""
        return (rgb - self.mean) / self.std

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        terms = self.terms(Views(*batch))
        total = torch.stack([self.weights.get(name, 1.0) * value for name, value in terms.items()]).sum()
        self.losses = {f"loss/{k}": v.detach() for k, v in terms.items()} | {"loss": total.detach()}
        self.log_dict(self.losses | {"step": torch.tensor(self.global_step + 1.0)})
        self._images += len(batch[0]) * self.trainer.world_size
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in on_train_batch_end: checkpoints are written before that hook, and must hold this.
        if not self.left_out:
            self.after_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % self.settings.log_every:
            return
        now = time.monotonic()
        facts = {"images_per_s": self._images / max(now - self._logged, 1e-9), "progress": self.progress}
        self._logged, self._images = now, 0
        facts["lr"], facts["weight_decay"] = self.rates()
        for name, features in zip(("class", "patch"), self.looked_at or (), strict=False):
            facts |= {f"std/{name}": feature_std(features), f"rank/{name}": effective_rank(features)}
        self.log_dict(facts)
        if self.trainer.is_global_zero:
            said = {k: float(v) for k, v in self.losses.items()} | facts
            log.info("step %d: %s", self.global_step, " ".join(f"{k} {v:.3g}" for k, v in said.items()))


class PrototypeHead(nn.Module):
    """Features (..., dim) -> scores (..., prototypes) in -1..1: an MLP, then cosines to learnt prototypes.

    DINO's head (Caron et al. 2021, arXiv 2104.14294, app. C): three layers with GELU, a bottleneck brought
    to length 1, prototypes of length 1 (weight normalisation with its gain held at 1).
    """

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)
        # Cosines in float32: temperatures of 0.04 would blow up the rounding of bfloat16 to a tenth.
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, functional.normalize(self.prototypes.float(), dim=-1, eps=1e-6))


class PixelDecoder(nn.Module):
    """Tokens of the visible patches -> pixels of all patches (He et al. 2021, arXiv 2111.06377, section 3).

    A narrow transformer over all positions, hidden ones filled with one learnt token; positions are fixed
    sines, so any image size works.
    """

    def __init__(self, dim: int, width: int, depth: int, heads: int, out: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, out)

    def forward(self, visible: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Visible tokens (B, k, dim) at the patch numbers keep (B, k) -> (B, rows * cols, out)."""
        B, patches = len(visible), grid[0] * grid[1]
        known = self.embed(visible)
        at = keep[..., None].expand(-1, -1, known.shape[-1])
        x = self.mask_token.to(known.dtype).expand(B, patches, -1).scatter(1, at, known)
        x = x + build_sincos2d_pos_embed(list(grid), x.shape[-1]).to(x)
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x))


class Network(nn.Module):
    """An encoder with its two heads: what student and teacher both are."""

    def __init__(self, config: ModelConfig, settings: DinoSettings, drop_path: float) -> None:
        super().__init__()
        dim, shape = config.encoder.dim, (settings.hidden, settings.bottleneck)
        self.encoder = Encoder(config.encoder.replaced(drop_path=drop_path), len(config.bands))
        # Encoders without a final norm of their own get one that belongs to the heads.
        self.norm = nn.Identity() if config.encoder.norm_taps else nn.LayerNorm(dim)
        self.class_head = PrototypeHead(dim, settings.class_prototypes, *shape)
        self.patch_head = PrototypeHead(dim, settings.patch_prototypes, *shape)

    def forward(self, x: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """The encoder's tokens, normalised; see `Encoder.tokens`."""
        tokens = self.encoder.tokens(x, mask, mask_token)
        return Tokens(self.norm(tokens.class_token), self.norm(tokens.patches))


class DinoModule(PretrainModule):
    """Student, EMA teacher, DINO on class tokens, iBOT on masked patches, KoLeo.

    The teacher runs in training mode. It has no stochastic depth, so that only means that a stem's batch
    norms use the statistics of the batch, and keep running ones of whole views, which the export needs.
    """

    def __init__(self, settings: PretrainSettings, stream: ViewStream) -> None:
        super().__init__(settings, stream)
        dino = settings.dino
        self.weights = {"dino": dino.dino_weight, "ibot": dino.ibot_weight, "koleo": dino.koleo_weight}
        self.student = Network(self.config, dino, self.config.encoder.drop_path)
        self.mask_token = nn.Parameter(torch.zeros(self.config.encoder.dim))
        self.teacher = Network(self.config, dino, 0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def encoders(self) -> Iterable[Encoder]:
        return self.student.encoder, self.teacher.encoder

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        yield from self.student.named_parameters()
        yield "mask_token", self.mask_token

    # ---- one step ------------------------------------------------------------------------------------
    def terms(self, views: Views) -> Terms:
        B, globals_ = views.wide.shape[:2]
        # View by view: (views * B, 3, H, W). Masks are random, so any order of them will do.
        wide, near = (self.normalised(x).transpose(0, 1).flatten(0, 1) for x in (views.wide, views.near))
        mask = views.masks.flatten(1)
        of_views, of_patches = self._teach(wide, mask)
        first, patches = self.student(wide, mask, self.mask_token)
        scores = [self.student.class_head(first)]
        if len(near):
            scores.append(self.student.class_head(self.student(near).class_token))
        d = self.settings.dino
        every = torch.cat(scores).unflatten(0, (-1, B))  # (views, B, prototypes)
        out = {"dino": losses.dino_loss(every, of_views.unflatten(0, (globals_, B)), d.student_temperature)}
        hidden = self.student.patch_head(patches[mask])
        image = mask.nonzero()[:, 0]
        out["ibot"] = losses.ibot_loss(hidden, of_patches, image, len(wide), d.student_temperature)
        # DINOv2 sums over the views.
        out["koleo"] = torch.stack([losses.koleo_loss(x) for x in first.split(B)]).sum()
        return out

    @torch.no_grad()
    def _teach(self, wide: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities: (globals * B, class prototypes), (masked, patch prototypes)."""
        d = self.settings.dino
        heat = ramp(
            self.progress, d.teacher_temperature_start, d.teacher_temperature, end=d.temperature_warmup
        )
        first, patches = self.teacher(wide)
        self.looked_at = first, patches.flatten(0, 1)
        of_views = losses.sinkhorn(self.teacher.class_head(first), heat)
        return of_views, losses.sinkhorn(self.teacher.patch_head(patches[mask]), heat)

    # ---- around it -----------------------------------------------------------------------------------
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.progress < self.settings.dino.freeze_last:
            for head in (self.student.class_head, self.student.patch_head):
                head.prototypes.grad = None

    def after_step(self) -> None:
        d = self.settings.dino
        follow(self.teacher, self.student, ramp(self.progress, d.momentum, d.momentum_end, shape="cosine"))

    def useful_encoder(self) -> Encoder:
        encoder = Encoder(self.config.encoder, len(self.config.bands))
        encoder.load_state_dict(self.teacher.encoder.state_dict())
        return encoder.to(self.device).eval()


class MaeModule(PretrainModule):
    """Hide most patches, encode the rest, let a light decoder paint the hidden pixels.

    Hidden tokens are dropped, so the transformer sees a quarter of them, with their own positions. A
    convolutional stem still runs over the whole image, hidden patches blanked. Statistics of such images
    would be mostly those of blanks, and later ones of whole images would not fit the weights; so in each step
    the stem's batch norms take (as constants) what they measure on the same images unmasked, and for the
    probe and the export what they measure on some batches of them.
    """

    def __init__(self, settings: PretrainSettings, stream: ViewStream) -> None:
        super().__init__(settings, stream)
        e, m = self.config.encoder, settings.mae
        self.encoder = Encoder(e, len(self.config.bands))
        self.norm = nn.Identity() if e.norm_taps else nn.LayerNorm(e.dim)
        self.decoder = PixelDecoder(e.dim, m.width, m.depth, m.heads, e.patch**2 * len(self.config.bands))

    def encoders(self) -> Iterable[Encoder]:
        return (self.encoder,)

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.named_parameters()

    def terms(self, views: Views) -> Terms:
        rgb = views.wide[:, 0]
        patch = self.config.patch_px
        grid = rgb.shape[-2] // patch, rgb.shape[-1] // patch
        m, x = self.settings.mae, self.normalised(rgb)
        keep, mask = random_masks(len(rgb), grid, m.mask, m.unit, rgb.device)
        if self.encoder.stem is not None:
            update_bn([x], self.encoder.stem)
            self.encoder.stem.eval()
        tokens = self.encoder.tokens(x, mask=mask, keep=keep)
        visible = self.norm(tokens.patches)
        self.looked_at = tokens.class_token.detach(), visible.detach().flatten(0, 1)
        predicted = self.decoder(visible, keep, grid)
        return {"mae": losses.mae_loss(predicted, rgb, mask, patch)}

    @torch.no_grad()
    def useful_encoder(self) -> Encoder:
        encoder = Encoder(self.config.encoder, len(self.config.bands)).to(self.device)
        encoder.load_state_dict(self.encoder.state_dict())
        if encoder.stem is not None:
            wide = [self.stream.make(i).wide[:, 0].to(self.device) for i in range(_NORM_BATCHES)]
            update_bn([self.normalised(x) for x in wide], encoder.stem)
        return encoder.eval()


def random_masks(
    count: int, grid: tuple[int, int], share: float, unit: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What to keep, drawn in squares of `unit` x `unit` patches of a grid (rows, cols); at least one square.

    Returns:
        Patch numbers (count, k), rising, and masks (count, rows * cols), True = hidden.
    """
    rows, cols = grid
    squares = rows // unit * (cols // unit)
    kept = max(1, squares - round(share * squares))
    # Drawn on the CPU: the same masks whatever the device.
    chosen = torch.rand(count, squares).argsort(dim=1)[:, :kept]
    hidden = torch.ones(count, squares, dtype=torch.bool).scatter(1, chosen, False)
    hidden = hidden.reshape(count, rows // unit, cols // unit)
    mask = hidden.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1).to(device)
    return (~mask).nonzero()[:, 1].reshape(count, -1), mask
