"""Training the GEDI model: L1 on relative heights, whole regions held out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from canopy.calibration.gedi_samples import Samples
from canopy.chips.augment import vary_colour
from canopy.errors import ConfigError, DataError
from canopy.models.gedi import GediModel
from canopy.runtime import NoProgress, Progress, log


def split_regions(samples: Samples, held_out: Sequence[str]) -> tuple[Samples, Samples]:
    """Samples of all other regions, and of the held-out ones (names may be beginnings).

    Raises:
        DataError: a name that is no region, or nothing left to train on.
    """
    regions = sorted(set(samples.region.tolist()))
    chosen = np.zeros(len(samples), bool)
    for name in held_out:
        at = np.array([str(r).startswith(name) for r in samples.region])
        if not at.any():
            raise DataError(f"no region {name!r}", expected=f"one of: {', '.join(regions)}")
        chosen |= at
    if chosen.all() or not chosen.any():
        raise DataError("no samples on one side of the split", expected=f"some of: {', '.join(regions)}")
    return samples.take(~chosen), samples.take(chosen)


def train_gedi(
    samples: Samples,
    *,
    rh: int = 98,
    steps: int = 600,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    width: int = 24,
    minutes: float | None = None,
    progress: Progress | None = None,
) -> GediModel:
    """Train from scratch with AdamW, a warm-up, a cosine learning rate and the L1 loss (as published).

    Images are turned, mirrored and varied in colour; facts are hidden half of the time, so that the
    model also works without them and leans on the image.

    Args:
        width: channels of the first stage; the model grows with its square.
        minutes: stop there at the latest; the learning rate falls to nothing by then.

    Raises:
        ConfigError: steps or batch below 1.
    """
    if steps < 1 or batch < 1:
        raise ConfigError(f"{steps} steps of {batch} samples", expected="at least 1 of each")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = GediModel(rh, width).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    progress = progress or NoProgress()
    progress.start(steps, "training")
    started = time.perf_counter()
    # Rare heights are drawn more often: a plain draw would teach the mean.
    weights = _flat_by_height(samples.height_m)
    for step in range(steps):
        done = max(step / steps, (time.perf_counter() - started) / (60 * minutes) if minutes else 0.0)
        if done >= 1:
            log.info(f"stopped after {step} steps: time is up")
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, done / 0.1 + 0.01) * (0.5 + 0.5 * np.cos(np.pi * done))
        chosen = rng.choice(len(samples), batch, p=weights)
        rgb, facts = _augmented(samples, chosen, rng)
        loss = (model(rgb, facts) - torch.from_numpy(samples.height_m[chosen])).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        progress.advance()
        if step % 100 == 0:
            log.info(f"step {step}: L1 {loss.item():.2f} m")
    return model.eval()


def _flat_by_height(height_m: np.ndarray) -> np.ndarray:
    counts = np.bincount((height_m / 5).astype(int))
    weights = 1 / np.sqrt(counts[(height_m / 5).astype(int)])
    return weights / weights.sum()


def _augmented(samples: Samples, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    crops = []
    for i in chosen:
        rgb = samples.rgb[i].astype(np.float32) / 255.0
        rgb = np.rot90(rgb, int(rng.integers(4)), axes=(1, 2))
        rgb = np.ascontiguousarray(rgb[:, :, ::-1] if rng.random() < 0.5 else rgb)
        crops.append(vary_colour(rgb, rng, 0.7 * rng.random()))
    facts = samples.facts[chosen].copy()
    facts[rng.random(len(chosen)) < 0.5] = np.nan
    return torch.from_numpy(np.stack(crops).astype(np.float32)), torch.from_numpy(facts)


@torch.inference_mode()
def predict_gedi(model: GediModel, rgb: np.ndarray, facts: np.ndarray, batch: int = 64) -> np.ndarray:
    """Relative heights (n,) float32 of uint8 crops (n, 3, 128, 128) and facts (n, 5)."""
    parts = [
        model(
            torch.from_numpy(rgb[i : i + batch].astype(np.float32) / 255.0),
            torch.from_numpy(facts[i : i + batch].astype(np.float32)),
        ).numpy()
        for i in range(0, len(rgb), batch)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def score_gedi(model: GediModel, samples: Samples, constant_m: float) -> dict[str, Any]:
    """MAE, bias and correlation on samples, beside the MAE of a constant (the training median)."""
    # Regions that were held out are far from the places the model knows: they must not be told.
    predicted = predict_gedi(model, samples.rgb, np.full_like(samples.facts, np.nan))
    error = predicted - samples.height_m
    varies = predicted.std() > 1e-6 and samples.height_m.std() > 1e-6
    return {
        "n": len(samples),
        "mae_m": round(float(np.abs(error).mean()), 3),
        "bias_m": round(float(error.mean()), 3),
        "r": round(float(np.corrcoef(predicted, samples.height_m)[0, 1]), 3) if varies else None,
        "mae_constant_m": round(float(np.abs(samples.height_m - constant_m).mean()), 3),
    }
