"""What sits on the encoder while it pretrains: prototype heads for DINO and iBOT, a decoder for MAE."""

from __future__ import annotations

import math

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional


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
        x = x + sine_positions(grid, x.shape[-1]).to(x)
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x))


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed positions (rows * cols, width): sines and cosines of the row in one half, of the column in the
    other (Vaswani et al. 2017, arXiv 1706.03762, section 3.5). Raises ValueError unless 4 divides width."""
    if width % 4:
        raise ValueError(f"positions of width {width}, expected a multiple of 4")
    rates = torch.exp(-math.log(10_000.0) * torch.arange(width // 4) / (width // 4))
    rows, cols = (torch.arange(n).float()[:, None] * rates for n in grid)
    y, x = (torch.cat([a.sin(), a.cos()], dim=1) for a in (rows, cols))
    return torch.cat([y[:, None].expand(-1, grid[1], -1), x[None].expand(grid[0], -1, -1)], dim=2).flatten(
        0, 1
    )
