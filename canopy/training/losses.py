"""Losses between predicted and measured heights. Pure functions of (B, 1, H, W) tensors in metres.

`weight` is >= 0 and 0 where the height is unknown; a loss is a weighted mean over the known pixels and 0
where there are none.

GEDI shots are labels too: the height of a 25 m disc, placed to about ten metres. A shot's relative height
(RH98, say) is the height below which 98 % of the returned energy lies: close to the top of what stands in the
disc, and neither its mean nor its one highest pixel. In `footprint_loss` a disc of a predicted map stands for
it as the mean of its highest tenth of pixels, which lies near their 95th percentile, and lets the gradient
reach some fifty pixels instead of one.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from canopy.training.optim import mean_of_processes

RADIUS_M = 12.5
EPS_M = 0.1
_LEAST_LABELS = 16  # pixels, to choose a shift by


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """sum(values * weight) / sum(weight), 0 where nothing has weight.

    With several processes the weights are those of all, so that the mean of their results (and of their
    gradients) is what one process would have for the whole batch, however the known pixels are spread.
    """
    return (values * weight).sum() / mean_of_processes(weight.sum()).clamp_min(1e-6)


def charbonnier(pred: Tensor, target: Tensor, weight: Tensor, eps: float = 0.1) -> Tensor:
    """Mean of sqrt(d^2 + eps^2) - eps in metres: L1 for large errors, smooth at 0 (Charbonnier 1994)."""
    return weighted_mean(torch.sqrt((pred - target) ** 2 + eps * eps) - eps, weight)


def silog(pred: Tensor, target: Tensor, weight: Tensor, lam: float = 0.85, eps: float = 1.0) -> Tensor:
    """Scale-invariant log loss sqrt(E[g^2] - lam E[g]^2), g = log(pred + eps) - log(target + eps).

    Eigen et al. 2014 (arXiv 1406.2283). `eps` in metres keeps bare ground from ruling the logarithm. Of
    several processes each has the root of its own batch.
    """
    g = torch.log(pred.clamp_min(0) + eps) - torch.log(target + eps)
    mean, square = weighted_mean(g, weight), weighted_mean(g * g, weight)
    return torch.sqrt((square - lam * mean * mean).clamp_min(1e-8))


def gradient_loss(pred: Tensor, target: Tensor, weight: Tensor, scales: int = 3) -> Tensor:
    """Mean |difference of neighbouring errors| in metres, averaged over halved scales.

    After MiDaS (Ranftl et al. 2020, arXiv 1907.01341), on heights rather than disparity: it asks for
    crown edges where the lidar has them, and is blind to a constant error.
    """
    error = (pred - target) * (weight > 0)
    known = (weight > 0).to(pred.dtype)
    total = pred.new_zeros(())
    scales = min(scales, min(pred.shape[-2:]).bit_length())  # a side of 1 cannot be halved
    for scale in range(scales):
        for axis in (-1, -2):
            pairs = error.diff(dim=axis).abs()
            both = known.narrow(axis, 1, known.shape[axis] - 1) * known.narrow(axis, 0, known.shape[axis] - 1)
            total = total + weighted_mean(pairs, both)
        if scale + 1 < scales:
            # Only blocks known throughout go on to the next scale.
            known = (functional.avg_pool2d(known, 2) > 0.999).to(pred.dtype)
            error = functional.avg_pool2d(error, 2) * known
    return total / (2 * scales)


def two_hot_loss(scores: Tensor, target: Tensor, weight: Tensor, centres_m: Tensor) -> Tensor:
    """Cross-entropy of bin scores (B, bins, H, W) against the two bins around the target height.

    The target's mass is split so that its mean is the height itself ("two-hot"; Schrittwieser et al.
    2020; why classification helps regression: Imani and White 2018, arXiv 1806.04613). `centres_m` (bins,)
    must rise.
    """
    target = target.clamp(float(centres_m[0]), float(centres_m[-1]))
    upper = torch.searchsorted(centres_m, target.contiguous()).clamp(1, len(centres_m) - 1)
    low, high = centres_m[upper - 1], centres_m[upper]
    share = (target - low) / (high - low)
    normaliser = torch.logsumexp(scores, dim=1, keepdim=True)
    chosen = (1 - share) * scores.gather(1, upper - 1) + share * scores.gather(1, upper)
    return weighted_mean(normaliser - chosen, weight)


def ranked_loss(probabilities: Tensor, target: Tensor, weight: Tensor, centres_m: Tensor) -> Tensor:
    """Continuous ranked probability score, in metres, of bin weights (B, bins, H, W) that sum to 1.

    The integral of (F(x) - [x >= target])^2 over the bins' range, F the distribution with its mass at the
    centres (Matheson and Winkler 1976; Hersbach 2000). Unlike cross-entropy it knows that the next bin is
    nearly right; unlike a loss on the mean it asks for an honest spread. `centres_m` (bins,) must rise.
    """
    y = target.clamp(float(centres_m[0]), float(centres_m[-1]))
    low = centres_m[:-1].view(1, -1, 1, 1)
    width = centres_m.diff().view(1, -1, 1, 1)
    below = (y - low).clamp_min(0).minimum(width)
    F = probabilities.cumsum(dim=1)[:, :-1]
    score = (F * F * below + (1 - F) ** 2 * (width - below)).sum(dim=1, keepdim=True)
    return weighted_mean(score, weight)


def height_factor(target: Tensor, knots: tuple[tuple[float, float], ...]) -> Tensor:
    """What a pixel of measured height counts: straight lines between knots (metres, factor), flat outside."""
    if not knots:
        return torch.ones_like(target)
    heights = target.new_tensor([h for h, _ in knots])
    factors = target.new_tensor([f for _, f in knots])
    if len(knots) == 1:
        return factors.expand_as(target)
    upper = torch.searchsorted(heights, target.contiguous()).clamp(1, len(knots) - 1)
    share = ((target - heights[upper - 1]) / (heights[upper] - heights[upper - 1])).clamp(0, 1)
    return torch.lerp(factors[upper - 1], factors[upper], share)


def shifted(x: Tensor, down: int, right: int) -> Tensor:
    """Move (B, C, H, W) by whole pixels, zeros coming in."""
    H, W = x.shape[-2:]
    out = torch.zeros_like(x)
    out[..., max(down, 0) : H + min(down, 0), max(right, 0) : W + min(right, 0)] = x[
        ..., max(-down, 0) : H + min(-down, 0), max(-right, 0) : W + min(-right, 0)
    ]
    return out


def best_shift(pred: Tensor, target: Tensor, weight: Tensor, reach: int, penalty: float) -> Tensor:
    """For each crop the shift (down, right) of the labels that fits the prediction best; int (B, 2).

    Image and lidar are 1-2 m apart, in a direction that differs from place to place. Compared are the mean
    absolute errors at all whole-pixel shifts up to `reach`, plus `penalty` metres per pixel of shift,
    so that a flat crop stays where it is. All shifts are judged on the same labels, those that no shift moves
    out of the crop: otherwise a shift could win by losing the labels that fit badly. Where fewer than 16 of
    them are known, the crop stays where it is. No gradient passes through the choice.
    """
    pred, inner, (H, W) = pred.detach(), torch.zeros_like(weight), weight.shape[-2:]
    rows, cols = slice(reach, max(H - reach, 0)), slice(reach, max(W - reach, 0))
    inner[..., rows, cols] = weight[..., rows, cols]
    known = inner.sum((1, 2, 3)).clamp_min(1e-6)
    # (0, 0) first: of equal costs the first is taken.
    steps = sorted(product(range(-reach, reach + 1), repeat=2), key=lambda step: step[0] ** 2 + step[1] ** 2)
    costs = []
    for down, right in steps:
        error = (pred - shifted(target, down, right)).abs() * shifted(inner, down, right)
        costs.append(error.sum((1, 2, 3)) / known + penalty * (down * down + right * right) ** 0.5)
    choice = torch.stack(costs).argmin(0)
    choice[(inner > 0).sum((1, 2, 3)) < _LEAST_LABELS] = 0
    return torch.tensor(steps, device=pred.device)[choice]


def align_labels(target: Tensor, weight: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Apply `best_shift` to labels and weights, crop by crop."""
    moves = [(int(d), int(r)) for d, r in shifts.tolist()]
    moved = [shifted(target[i : i + 1], *m) for i, m in enumerate(moves)]
    weights = [shifted(weight[i : i + 1], *m) for i, m in enumerate(moves)]
    return torch.cat(moved), torch.cat(weights)


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
    total = mean_of_processes(shots[..., 3].sum())  # of all processes, as in `weighted_mean`
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
