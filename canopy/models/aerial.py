"""v1's own normalisation of aerial images: a small network that foretells a satellite's colours.

From a 256 px crop of an aerial image it predicts the 5th and 95th percentile that each band would have in the
satellite mosaics that v1 learned; the crop is then stretched onto them (Tolan et al. 2024, arXiv 2304.07213).
Its published checkpoint holds a training run, of which nothing but the network's tensors is taken.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from canopy.errors import CheckpointError
from canopy.models.checkpoint import differences
from canopy.models.foreign import open_weights

CROP_PX = 256
_WIDTHS = (8, 16, 32, 64, 64, 128)
_PREFIX = "backbone."


class PercentileNet(nn.Module):
    """RGB crops (B, 3, 256, 256) in 0..1 -> r5, r95, g5, g95, b5, b95 (B, 6), the order of `Stretch`."""

    def __init__(self) -> None:
        super().__init__()
        names = ("input_layer", *(f"conv_block{i}" for i in range(1, 6)))
        for name, into, out in zip(names, (3, *_WIDTHS), _WIDTHS, strict=False):
            mix, look = nn.Conv2d(into, out, 1), nn.Conv2d(out, out, 3, padding=1)
            self.add_module(name, nn.Sequential(mix, nn.BatchNorm2d(out), nn.ReLU(), look))
        self.pool, self.blocks = nn.MaxPool2d(2), names
        sides = (_WIDTHS[-1] * (CROP_PX >> 5) ** 2, 64, 64, 32)
        for i in range(3):
            self.add_module(f"fc{i + 1}", nn.Sequential(nn.Linear(sides[i], sides[i + 1]), nn.ReLU()))
        self.fc4 = nn.Linear(sides[-1], 6)

    def forward(self, rgb: Tensor) -> Tensor:
        x = rgb
        for name in self.blocks[:-1]:
            x = self.pool(getattr(self, name)(x))
        x = getattr(self, self.blocks[-1])(x).flatten(1)
        for i in range(1, 5):
            x = getattr(self, f"fc{i}")(x)
        return x.view(-1, 2, 3).mT.flatten(1)  # published: the bands' 5th, then their 95th


def load_percentile_net(path: str | Path) -> PercentileNet:
    """The network of a checkpoint, in eval mode.

    Raises CheckpointError for a file that cannot be read safely, or that holds another network.
    """
    found = open_weights(Path(path), stand_ins=True).tensors
    state, net = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}, PercentileNet()
    shapes = ({k: tuple(t.shape) for k, t in tensors.items()} for tensors in (net.state_dict(), state))
    if wrong := differences(*shapes):
        raise CheckpointError(
            f"is not v1's network of aerial normalisation ({wrong})",
            where=path,
            expected="aerial_normalization_quantiles_predictor.ckpt",
        )
    net.load_state_dict(state)
    return net.eval()
