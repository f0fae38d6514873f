"""GEDI shots as labels: the height of a 25 m disc, placed to about ten metres, against the predicted map.

A shot's relative height (RH98, say) is the height below which 98 % of the returned energy lies: close to
the top of what stands in the disc, and neither its mean nor its one highest pixel. Here a disc of a predicted
map stands for it as the mean of its highest tenth of pixels, which lies near their 95th percentile, and lets
the gradient reach some fifty pixels instead of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from canopy.training.processes import mean_of_processes

RADIUS_M = 12.5
EPS_M = 0.1


def footprint_loss(
    pred: Tensor, shots: Tensor, *, top: float = 0.1, reach_m: float = 10.0, penalty: float = 0.05
) -> Tensor:
    """Weighted mean over shots of a smooth |pooled prediction - shot| in metres; 0 where there are no shots.

    GEDI places its shots to about 10 m (Dubayah et al. 2020, doi 10.1016/j.srs.2020.100002). So each shot
    may lie at the best of 17 places: where it says, and in eight directions at half and at the whole of
    `reach_m`. No gradient passes through the choice, and places whose disc leaves the map are left out.

    Args:
        pred: heights (B, 1, H, W) in metres.
        shots: (B, K, 5): row, col, height in metres, weight (0 = no shot), radius of the disc; lengths in
            pixels of `pred`, (0, 0) its upper-left corner. The radius is 12.5 m, which gives the scale.
        top: share of the disc's pixels whose mean stands for the shot's height.
        reach_m: how far a shot may move; 0 leaves it.
        penalty: metres of error that each metre of movement costs in the choice.
    """
    image, slot = torch.nonzero(shots[..., 3] > 0, as_tuple=True)
    total = mean_of_processes(shots[..., 3].sum())  # of all processes, as in `height_losses.weighted_mean`
    if not len(image):
        return pred.sum() * 0.0
    chosen = shots[image, slot].to(pred.dtype)
    moves = offsets(reach_m, pred.device).to(pred.dtype)
    scale = chosen[:, 4:5] / RADIUS_M  # pixels to a metre
    places = chosen[:, None, :2] + moves[None] * scale[:, :, None]  # (n, moves, 2)
    with torch.no_grad():
        pooled, fits = pool_discs(pred.detach(), image, places, chosen[:, 4], top)
        cost = (pooled - chosen[:, None, 2]).abs() + penalty * moves.norm(dim=1)
        cost = torch.where(fits, cost, math.inf)
        cost[:, 0] = torch.where(torch.isfinite(cost).any(dim=1), cost[:, 0], 0.0)
        best = cost.argmin(dim=1)
    at = places[torch.arange(len(best), device=best.device), best][:, None]
    error = pool_discs(pred, image, at, chosen[:, 4], top)[0][:, 0] - chosen[:, 2]
    return ((torch.sqrt(error**2 + EPS_M**2) - EPS_M) * chosen[:, 3]).sum() / total


def offsets(reach_m: float, device: torch.device | str = "cpu") -> Tensor:
    """Places (m, 2) of a shot relative to where it says, in metres; the first is (0, 0)."""
    if reach_m <= 0:
        return torch.zeros(1, 2, device=device)
    angles = [k * math.pi / 4 for k in range(8)]
    around = [(r * math.sin(a), r * math.cos(a)) for r in (reach_m / 2, reach_m) for a in angles]
    return torch.tensor([(0.0, 0.0), *around], device=device)


def pool_discs(
    pred: Tensor, image: Tensor, places: Tensor, radius: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """Mean of the highest `top` of the pixels whose centre lies in a disc.

    Args:
        pred: (B, 1, H, W); image: (n,) which of the B; places: (n, m, 2) row and col of the discs' centres;
        radius: (n,) in pixels; top: share, at least one pixel is taken.

    Returns:
        Heights (n, m), and bool (n, m): the disc lies wholly on the map and holds a pixel.
    """
    H, W = pred.shape[-2:]
    reach = int(torch.ceil(radius.max())) + 1
    steps = torch.arange(-reach, reach + 1, device=pred.device)
    near = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(-1, 2)
    pixel = places.floor().long()[:, :, None] + near  # (n, m, L, 2)
    far = ((pixel + 0.5 - places[:, :, None]) ** 2).sum(dim=-1)
    disc = far <= radius[:, None, None] ** 2
    row, col = pixel[..., 0], pixel[..., 1]
    on_map = (row >= 0) & (row < H) & (col >= 0) & (col < W)
    values = pred[image[:, None, None], 0, row.clamp(0, H - 1), col.clamp(0, W - 1)]
    values = torch.where(disc & on_map, values, -math.inf)
    ranked, _ = values.sort(dim=-1, descending=True)
    count = torch.isfinite(ranked).sum(dim=-1)
    taken = torch.ceil(top * count).clamp_min(1)
    chosen = torch.arange(ranked.shape[-1], device=pred.device) < taken[..., None]
    heights = torch.where(chosen & torch.isfinite(ranked), ranked, 0.0).sum(dim=-1) / taken
    return heights, (count > 0) & ~(disc & ~on_map).any(dim=-1)
