"""All metrics of two whole arrays at once: what the sums of parts must add up to."""

from __future__ import annotations

import numpy as np

from canopy import metrics


def score_arrays(
    map_m: np.ndarray,
    reference_m: np.ndarray,
    valid: np.ndarray | None = None,
    bounds_m: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """All metrics of two arrays of any equal shape, NaN where one does not exist.

    Block-R2 and edge error need two dimensions (h, w); blocks are counted from the upper left. `valid`
    (True = usable) defaults to where both are finite.
    """
    p, r = np.asarray(map_m), np.asarray(reference_m)
    ok = np.isfinite(p) & np.isfinite(r)
    ok = ok if valid is None else ok & valid
    one = np.zeros(int(ok.sum()), np.int64)
    limits = None if bounds_m is None else (bounds_m[0][ok], bounds_m[1][ok])
    sums = metrics.pixel_sums(p[ok], r[ok], one, 1, limits)
    if p.ndim == 2:
        wide = -(-p.shape[1] // metrics.BLOCK_PX)
        block = (np.arange(p.shape[0]) // metrics.BLOCK_PX)[:, None] * wide + np.arange(
            p.shape[1]
        ) // metrics.BLOCK_PX
        group = np.zeros(int(block.max(initial=-1)) + 1, np.int64)
        sums += metrics.block_sums(p[ok], r[ok], block[ok], group, 1)
        if min(p.shape) > 2:
            inner = np.zeros((p.shape[0] - 2, p.shape[1] - 2), np.int64)
            sums += metrics.gradient_sums(metrics.gradients(p, r, ok), inner, 1)
    counts = metrics.HeightCounts(), metrics.HeightCounts()
    for count, values in zip(counts, (p[ok], r[ok]), strict=True):
        count.add(values)
    return {k: float(v) for k, v in metrics.scores(sums[0]).items()} | metrics.percentile_errors(*counts)
