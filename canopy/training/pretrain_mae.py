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
from canopy.training.sharding import whole_state
from canopy.training.ssl_data import ViewStream
from canopy.training.ssl_heads import PixelDecoder

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
