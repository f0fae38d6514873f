"""Figures of the reports: PNG bytes, drawn off-screen, in colours that colour-blind readers can tell apart.

Heights are viridis (even in lightness, dark ground to bright crowns); signed differences PuOr (ColorBrewer's
diverging map that is safe for all common colour blindness, purple where the map is too low, orange where too
high); classes are Okabe and Ito's palette. What is not known is grey. Both sides of a pair share one scale.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from canopy.inference.output import draw_scale_bar

HEIGHTS = "viridis"
DIFFERENCES = "PuOr_r"
MISSING = "#c9c9c9"
INK = "#20262b"
BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#cc79a7",
)
CLASS_COLOURS = ("#e8e4da", SKY, ORANGE, GREEN, VERMILLION, PURPLE)
DPI = 110
PANEL_INCHES = 4.6


def _figure(width: float, height: float):  # type: ignore[no-untyped-def]
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 9, "axes.edgecolor": "#888", "axes.labelcolor": INK, "text.color": INK})
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure) -> bytes:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _panel_height(shape: tuple[int, ...], width: float) -> float:
    return float(np.clip(width * shape[0] / shape[1], 1.2, 1.6 * width))


def scale_top(*images: np.ndarray) -> float:
    """Upper end of a height scale: the 99.5th percentile of all images rounded up to 5 m, at least 5 m."""
    known = np.concatenate([image[np.isfinite(image)].ravel() for image in images])
    return 5.0 if not known.size else float(max(5.0, np.ceil(np.percentile(known, 99.5) / 5) * 5))


def difference_top(*images: np.ndarray) -> float:
    """End of a symmetric scale: the 98th percentile of the sizes, rounded up to 1 m, at least 1 m."""
    known = np.concatenate([np.abs(image[np.isfinite(image)]).ravel() for image in images])
    return 1.0 if not known.size else float(max(1.0, np.ceil(np.percentile(known, 98))))


def side_by_side(left: np.ndarray, right: np.ndarray, titles: tuple[str, str], metres_per_px: float) -> bytes:
    """Two height maps (h, w), metres, NaN where unknown, with one colour scale between them."""
    figure = _figure(2 * PANEL_INCHES + 0.9, _panel_height(left.shape, PANEL_INCHES) + 0.6)
    top = scale_top(left, right)
    axes = figure.subplots(1, 2)
    for axis, image, title in zip(axes, (left, right), titles, strict=True):
        drawn = _image(axis, image, HEIGHTS, 0, top, title)
        draw_scale_bar(axis, image.shape, metres_per_px)
    figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.02, extend="max", label="canopy height (m)")
    return _png(figure)


def difference_map(image: np.ndarray, label: str, metres_per_px: float) -> bytes:
    """A signed map (h, w) in metres."""
    width = 1.5 * PANEL_INCHES
    figure = _figure(width + 1.2, _panel_height(image.shape, width) + 0.4)
    axis = figure.subplots()
    top = difference_top(image)
    drawn = _image(axis, image, DIFFERENCES, -top, top, "")
    draw_scale_bar(axis, image.shape, metres_per_px)
    figure.colorbar(drawn, ax=axis, shrink=0.85, pad=0.02, extend="both", label=label)
    return _png(figure)


def class_map(codes: np.ndarray, names: Mapping[int, str], metres_per_px: float) -> bytes:
    """Class codes (h, w), 1..., 0 or NaN where unknown, with their legend."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    width = 1.5 * PANEL_INCHES
    figure = _figure(width + 1.2, _panel_height(codes.shape, width) + 0.7)
    axis = figure.subplots()
    colours = [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(len(names))]
    shown = np.where(codes > 0, codes, np.nan)
    palette = ListedColormap(colours).with_extremes(bad=MISSING)
    norm = BoundaryNorm([code - 0.5 for code in names] + [max(names) + 0.5], len(colours))
    axis.imshow(shown, cmap=palette, norm=norm, interpolation="nearest")
    _bare(axis)
    draw_scale_bar(axis, codes.shape, metres_per_px)
    patches = [
        Patch(facecolor=c, edgecolor="#777", label=n) for c, n in zip(colours, names.values(), strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return _png(figure)


def density(counts: np.ndarray, edges: np.ndarray, x_label: str, y_label: str) -> bytes:
    """Density scatter: counts (x bins, y bins) on log colours, with the 1:1 line and the median of y per
    x.
    """
    from matplotlib.colors import LogNorm

    counts = np.asarray(counts, dtype=float)
    used = max(4, int(np.flatnonzero(counts.sum(0) + counts.sum(1)).max(initial=0)) + 2)
    used = min(used, counts.shape[0])
    counts, edges = counts[:used, :used], np.asarray(edges, dtype=float)[: used + 1]
    if not np.isfinite(edges[-1]):
        edges = np.append(edges[:-1], 2 * edges[-2] - edges[-3])
    figure = _figure(5.6, 4.9)
    axis = figure.subplots()
    shown = np.where(counts > 0, counts, np.nan).T
    drawn = axis.pcolormesh(edges, edges, shown, cmap="viridis", norm=LogNorm(1, max(counts.max(), 2)))
    axis.plot(edges[[0, -1]], edges[[0, -1]], color=INK, lw=1, ls="--", label="1:1")
    centres = (edges[1:] + edges[:-1]) / 2
    rows = counts.sum(axis=1) > 0
    middle = [centres[np.searchsorted(np.cumsum(c), c.sum() / 2)] for c in counts[rows]]
    axis.plot(centres[rows], middle, color=VERMILLION, lw=1.8, label=f"median {y_label.split(' (')[0]}")
    axis.set(xlabel=x_label, ylabel=y_label, aspect="equal", facecolor="#f4f4f2")
    axis.legend(loc="upper left", fontsize=8, framealpha=0.85)
    figure.colorbar(drawn, ax=axis, shrink=0.85, pad=0.02, label="pixels")
    return _png(figure)


def error_by_height(
    rows: Sequence[Mapping[str, Any]],
    x_label: str,
    labels: tuple[str, str] = ("bias", "mean absolute error"),
    y_label: str = "error (m)",
) -> bytes:
    """Bias and MAE (with intervals where known) per height class over the share of pixels.

    Each row: name, n, and bias, mae as (value, low, high) with None where unknown.
    """
    figure = _figure(7.2, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = np.arange(len(rows))
    for offset, key, colour, marker in ((-0.1, "bias", BLUE, "o"), (0.1, "mae", VERMILLION, "s")):
        known = [
            (i, row[key]) for i, row in enumerate(rows) if row[key] is not None and row[key][0] is not None
        ]
        if not known:
            continue
        at = np.array([i for i, _ in known]) + offset
        value = np.array([v[0] for _, v in known], float)
        ends = np.array([[v[0] if e is None else e for e in v[1:]] for _, v in known], float)
        bars = np.abs(ends.T - value)
        above.errorbar(
            at, value, yerr=bars, fmt=marker, color=colour, ms=5, lw=1.2, capsize=2.5,
            label=labels[key == "mae"],
        )  # fmt: skip
    above.axhline(0, color=INK, lw=0.8)
    above.set_ylabel(y_label)
    above.grid(axis="y", color="#ddd", lw=0.6)
    above.legend(fontsize=8, frameon=False)
    total = max(1, sum(row["n"] for row in rows))
    below.bar(x, [100 * row["n"] / total for row in rows], color="#8a949c")
    below.set_ylabel("pixels (%)")
    below.set_xticks(x, [row["name"] for row in rows])
    below.set_xlabel(x_label)
    return _png(figure)


def points_map(lon: np.ndarray, lat: np.ndarray, error: np.ndarray, label: str) -> bytes:
    """Footprints or plots at their place, coloured by their signed error in metres."""
    figure = _figure(1.5 * PANEL_INCHES, 1.3 * PANEL_INCHES)
    axis = figure.subplots()
    top = difference_top(error)
    size = float(np.clip(4000 / max(len(error), 1), 3, 60))
    drawn = axis.scatter(
        lon, lat, c=error, s=size, cmap=DIFFERENCES, vmin=-top, vmax=top, linewidths=0.2, edgecolors="#555"
    )
    axis.set_aspect(1 / max(np.cos(np.radians(float(np.mean(lat)))), 0.05))
    axis.set(xlabel="longitude", ylabel="latitude", facecolor="#f4f4f2")
    axis.tick_params(labelsize=7)
    figure.colorbar(drawn, ax=axis, shrink=0.8, pad=0.02, extend="both", label=label)
    return _png(figure)


def block_strip(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], titles: tuple[str, str, str]) -> bytes:
    """Blocks as rows of map, reference and error; `rows` are (caption, map, reference), metres (h, w)."""
    top = scale_top(*(image for _, *pair in rows for image in pair))
    span = difference_top(*(pair[0] - pair[1] for _, *pair in rows))
    figure = _figure(7.0, 2.1 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for i, (caption, left, right) in enumerate(rows):
        for axis, image, title in zip(grid[i], (left, right, left - right), titles, strict=True):
            signed = title == titles[2]
            drawn = _image(
                axis, image, DIFFERENCES if signed else HEIGHTS,
                -span if signed else 0, span if signed else top,
                title if i == 0 else "",
            )  # fmt: skip
            if signed:
                error = drawn
            else:
                height = drawn
        grid[i, 0].set_ylabel(caption, fontsize=8)
    figure.colorbar(height, ax=grid[:, :2], shrink=0.8, pad=0.02, extend="max", label="height (m)")
    figure.colorbar(error, ax=grid[:, 2:], shrink=0.8, pad=0.02, extend="both", label="error (m)")
    return _png(figure)


def _image(axis, image, colours, low, high, title):  # type: ignore[no-untyped-def]
    from matplotlib import colormaps

    palette = colormaps[colours].with_extremes(bad=MISSING)
    drawn = axis.imshow(image, cmap=palette, vmin=low, vmax=high, interpolation="nearest")
    _bare(axis)
    if title:
        axis.set_title(title, fontsize=10, loc="left")
    return drawn


def _bare(axis) -> None:  # type: ignore[no-untyped-def]
    axis.set_xticks([])
    axis.set_yticks([])
