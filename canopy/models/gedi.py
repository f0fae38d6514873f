"""A small network that predicts a GEDI relative height from the image round a footprint.

As published for the first high-resolution map (Tolan et al. 2024, arXiv 2304.07213): a CNN sees 128 x 128 RGB
pixels and is told latitude, longitude, sun elevation, off-nadir angle and terrain slope. Any of these may be
missing: each then has an embedding of its own.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from canopy.errors import CheckpointError, InputError
from canopy.files import replacing

CROP_PX = 128
GSD_M = 0.5
FOOTPRINT_PX = 25.0 / GSD_M
FACTS = ("lat_deg", "lon_deg", "sun_elevation_deg", "off_nadir_deg", "slope_deg")
# Fixed scales, so that one place has one meaning in every model; the network learns the rest.
_SCALE = (45.0, 90.0, 45.0, 20.0, 30.0)
FORMAT = "canopy-gedi"
_MEAN, _STD = (0.42, 0.41, 0.30), (0.21, 0.16, 0.14)


class GediModel(nn.Module):
    """`model(rgb, facts)`: RGB (B, 3, 128, 128) in 0..1 and facts (B, 5), NaN where missing, to metres (B,).

    Attributes:
        rh: which relative height it predicts.
        card: facts about the weights.
    """

    def __init__(self, rh: int = 98, width: int = 24) -> None:
        super().__init__()
        self.rh, self.width = rh, width
        self.card: dict[str, Any] = {}
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, b), nn.GELU(),
                    nn.Conv2d(b, b, 3, padding=1, groups=b, bias=False), nn.Conv2d(b, b, 1), nn.GELU(),
                )
                for a, b in itertools.pairwise(widths)
            )
        )  # fmt: skip
        self.missing = nn.Parameter(torch.zeros(len(FACTS), 8))
        self.known = nn.Linear(1, 8)
        self.head = nn.Sequential(
            nn.Linear(2 * widths[-1] + 8 * len(FACTS), 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 1)
        )
        self.mean: Tensor
        self.std: Tensor
        self.disc: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("disc", _disc(CROP_PX // 16), persistent=False)

    def forward(self, rgb: Tensor, facts: Tensor) -> Tensor:
        """Metres (B,), not negative."""
        if rgb.shape[1:] != (3, CROP_PX, CROP_PX) or facts.shape != (len(rgb), len(FACTS)):
            raise InputError(
                f"the GEDI model got RGB {tuple(rgb.shape)} and facts {tuple(facts.shape)}",
                expected=f"(B, 3, {CROP_PX}, {CROP_PX}) and (B, {len(FACTS)})",
            )
        maps = self.stages((rgb - self.mean) / self.std)
        inner = (maps * self.disc).sum(dim=(2, 3)) / self.disc.sum()
        told = self._told(facts)
        out = self.head(torch.cat([inner, maps.mean(dim=(2, 3)), told], dim=1))[:, 0]
        return 10.0 * nn.functional.softplus(out)

    def _told(self, facts: Tensor) -> Tensor:
        """Embedding (B, 40) of the facts; a missing one gets its own vector."""
        there = torch.isfinite(facts)
        scaled = torch.where(there, facts, torch.zeros_like(facts)) / facts.new_tensor(_SCALE)
        embedded = self.known(scaled[..., None])
        return torch.where(there[..., None], embedded, self.missing.to(embedded)).flatten(1)


def _disc(side: int) -> Tensor:
    """(1, 1, side, side): share of each feature cell that lies in the footprint, sampled 8 x 8."""
    fine = (torch.arange(side * 8) + 0.5) / 8 - side / 2
    radius = FOOTPRINT_PX / 2 * side / CROP_PX
    inside = (fine[:, None] ** 2 + fine[None, :] ** 2 <= radius**2).float()
    return inside.view(side, 8, side, 8).mean(dim=(1, 3))[None, None]


def save_gedi_model(path: str | Path, model: GediModel, card: dict[str, Any]) -> None:
    """Write weights and card atomically, as safetensors."""
    from safetensors.torch import save_file

    path = Path(path)
    header = {"format": FORMAT, "config": json.dumps({"rh": model.rh, "width": model.width}),
              "card": json.dumps(card)}  # fmt: skip
    with replacing(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, part, header)
        part.chmod(0o644)


def load_gedi_model(path: str | Path) -> GediModel:
    """A model of `save_gedi_model`, in eval mode.

    Raises:
        CheckpointError: no such file, or not such a model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no such file", where=path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    "is not a GEDI model", where=path, expected="a file of pipelines/train_gedi.py"
                )
            model = GediModel(**json.loads(header["config"]))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot be used ({' '.join(str(error).split())[:120]})", where=path) from error
    model.card = json.loads(header.get("card", "{}"))
    return model.eval()
