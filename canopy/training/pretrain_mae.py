"""Masked autoencoding (He et al. 2021, arXiv 2111.06377) of the same encoder: the second pretext task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from canopy.chips.streams import Views
from canopy.models.encoder import Encoder
from canopy.training import ssl_losses as losses
from canopy.training.pretrain import PretrainModule, Terms
from canopy.training.pretrain_settings import PretrainSettings
from canopy.training.probe import HeightProbe
from canopy.training.ssl_data import ViewStream
from canopy.training.ssl_heads import PixelDecoder

_NORM_BATCHES = 8


class MaeModule(PretrainModule):
    """Hide most patches, encode the rest, let a light decoder paint the hidden pixels.

    Hidden tokens are dropped, so the transformer sees a quarter of them, with their own positions. A
    convolutional stem still runs over the whole image, hidden patches blanked; its running statistics are of
    such images, and are measured again on whole ones for the probe and the export.
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
        keep, mask = random_masks(len(rgb), grid[0] * grid[1], self.settings.mae.mask, rgb.device)
        tokens = self.encoder.tokens(self.normalised(rgb), mask=mask, keep=keep)
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
            measure_norms(encoder.stem, [self.normalised(x) for x in wide])
        return encoder.eval()


def random_masks(count: int, patches: int, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patch numbers to keep (count, k >= 1), rising, and masks (count, patches), True = hidden."""
    kept = max(1, patches - round(share * patches))
    # Drawn on the CPU: the same masks whatever the device.
    order = torch.rand(count, patches).argsort(dim=1)[:, :kept].sort(dim=1).values.to(device)
    mask = torch.ones(count, patches, dtype=torch.bool, device=device)
    return order, mask.scatter(1, order, False)


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
