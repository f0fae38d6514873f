"""The statistics that can stand for many pixels: mean, highest, percentile; named as `--stat` names them."""

from __future__ import annotations

import re

import numpy as np

from canopy.errors import InputError


def percent_of(stat: str, where: str | None = None) -> float | None:
    """NN of "pNN", 100 for "max", None for "mean". Raises InputError, naming `where`, for anything else."""
    if stat in ("mean", "max"):
        return 100.0 if stat == "max" else None
    match = re.fullmatch(r"p(\d{1,3}(?:\.\d+)?)", stat)
    if match is None or float(match[1]) > 100:
        raise InputError(
            f"statistic {stat!r}", where=where, expected="mean, max, or a percentile such as p95"
        )
    return float(match[1])


def statistic_of(values: np.ndarray, known: np.ndarray, percent: float | None) -> np.ndarray:
    """Over the known values of the last axis (..., k): float64 (...), 0 where none is known.

    `percent`: see `percent_of`; percentiles are linear between ranks, as numpy's.
    """
    count = known.sum(axis=-1)
    if percent is None:
        return np.where(known, values, 0).sum(axis=-1, dtype=np.float64) / np.maximum(count, 1)
    if percent == 100:
        highest = np.where(known, values, -np.inf).max(axis=-1)
        return np.where(count > 0, highest, 0).astype(np.float64)
    ordered = np.sort(np.where(known, values, np.inf), axis=-1)
    rank = percent / 100 * np.maximum(count - 1, 0)
    low = np.floor(rank).astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0))
    below, above = (np.take_along_axis(ordered, at[..., None], -1)[..., 0] for at in (low, high))
    below, above = (np.where(count > 0, x, 0).astype(np.float64) for x in (below, above))
    return below + (rank - low) * (above - below)
