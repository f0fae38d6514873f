"""Losses of self-supervised pretraining: pure functions of tensors, all in float32.

Logits are raw scores of prototypes; temperatures are applied here. No gradient goes to the teacher.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from canopy.training.optim import distributed


# ---- the teacher's targets ---------------------------------------------------------------------------
@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher's logits (n, prototypes) -> probabilities (n, prototypes) that use all prototypes about evenly.

    Each iteration gives every prototype the same total, then every row the total 1 (Caron et al. 2020, arXiv
    2006.09882, eq. 3; in DINOv2, Oquab et al. 2023, arXiv 2304.07193). Worked in logarithms, so that no
    temperature overflows. With several processes the rows of all count; n may differ between them.
    """
    scores = logits.float() / temperature
    for _ in range(iterations):
        scores = scores - _logsumexp_of_all_rows(scores)
        scores = scores - torch.logsumexp(scores, dim=1, keepdim=True)
    # Without iterations it is an ordinary softmax.
    return torch.softmax(scores, dim=1)


def _logsumexp_of_all_rows(scores: Tensor) -> Tensor:
    """log of the summed exponentials of each column (1, prototypes), over the rows of every process."""
    if not distributed():
        return torch.logsumexp(scores, dim=0, keepdim=True)
    low = torch.finfo(scores.dtype).min
    top = scores.amax(dim=0, keepdim=True) if len(scores) else scores.new_full((1, scores.shape[1]), low)
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total = torch.exp(scores - top).sum(dim=0, keepdim=True)
    dist.all_reduce(total)
    return top + torch.log(total)


# ---- student against teacher -------------------------------------------------------------------------
def dino_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """DINO: every view of the student against every global view of the teacher but itself; the mean.

    Args:
        student: logits (views, B, prototypes), the global views first, in the teacher's order.
        teacher: probabilities (globals, B, prototypes).
    """
    views, globals_ = student.shape[0], teacher.shape[0]
    # Mixed precision would turn these products into bfloat16, of three digits.
    with torch.autocast(student.device.type, enabled=False):
        log_p = functional.log_softmax(student.float() / temperature, dim=-1)
        # (views, globals): cross-entropy averaged over the batch
        losses = -torch.einsum("vbk,gbk->vg", log_p, teacher.detach().float()) / student.shape[1]
    itself = torch.eye(views, globals_, dtype=torch.bool, device=losses.device)
    return losses.masked_fill(itself, 0).sum() / (views * globals_ - globals_)


def ibot_loss(
    student: Tensor, teacher: Tensor, image: Tensor, images: int, temperature: float = 0.1
) -> Tensor:
    """iBOT (Zhou et al. 2022, arXiv 2111.07832): masked patches; mean over each image's, then over images.

    As in DINOv2, images of which nothing is masked count as 0.

    Args:
        student: logits (n, prototypes) of all masked patches; teacher: probabilities of the same patches.
        image: (n,) whole numbers, which image each patch belongs to; images: how many there are.
    """
    log_p = functional.log_softmax(student.float() / temperature, dim=-1)
    losses = -(teacher.detach() * log_p).sum(dim=-1)
    counts = torch.bincount(image, minlength=images)
    return (losses / counts[image]).sum() / images


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """KoLeo (Sablayrolles et al. 2019, arXiv 1806.03198): spreads features (n >= 2, dim) of a batch evenly.

    -mean(log(distance to the nearest other one)), all of length 1.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = functional.normalize(features.float(), dim=-1, eps=eps)
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(dim=1)
        distance = functional.pairwise_distance(unit, unit[nearest], eps=eps)
        return -torch.log(distance + eps).mean()


# ---- masked autoencoding -----------------------------------------------------------------------------
def patchify(rgb: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) -> patches (B, rows * cols, patch * patch * C), row by row, colours last."""
    B, C, H, W = rgb.shape
    x = rgb.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def mae_loss(predicted: Tensor, rgb: Tensor, mask: Tensor, patch: int, eps: float = 1e-6) -> Tensor:
    """Masked autoencoding (He et al. 2021, arXiv 2111.06377): squared error of masked patches' pixels.

    Every patch of the image is first brought to mean 0 and variance 1 (unbiased), as the paper does best.

    Args:
        predicted: (B, patches, patch * patch * C); rgb: (B, C, H, W); mask: bool (B, patches), True = masked.
    """
    pixels = patchify(rgb.float(), patch)
    mean, var = pixels.mean(dim=-1, keepdim=True), pixels.var(dim=-1, keepdim=True)
    errors = (predicted.float() - (pixels - mean) / (var + eps).sqrt()).square().mean(dim=-1)
    return (errors * mask).sum() / mask.sum().clamp_min(1)
