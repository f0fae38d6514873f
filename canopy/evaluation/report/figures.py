"""Figures of the reports: PNG bytes, drawn off-screen, in colours that colour-blind readers can tell apart.

Heights are viridis (even in lightness, dark ground to bright crowns); signed differences PuOr (ColorBrewer's
diverging map that is safe for all common colour blindness, purple where the map is too low, orange where too
high); classes are Okabe and Ito's palette. What is not known is grey. Both sides of a pair share one scale.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.inference.picture import draw_scale_bar

if TYPE_CHECKING:
    from canopy.evaluation.scores import Score

HEIGHTS, DIFFERENCES = "viridis", "PuOr_r"
MISSING, INK, GROUND = "#c9c9c9", "#20262b", "#f4f4f2"
BLUE, VERMILLION = "#0072b2", "#d55e00"
CLASS_COLOURS = ("#e8e4da", "#56b4e9", "#e69f00", "#009e73", VERMILLION)
DPI = 110
PANEL_INCHES = 4.6


def _figure(width: float, height: float) -> Any:
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 9, "axes.edgecolor": "#888", "axes.labelcolor": INK, "text.color": INK})
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
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


def side_by_side(panels: Mapping[str, np.ndarray], metres_per_px: float) -> bytes:
    """Height maps (h, w), metres, NaN where unknown, on one colour scale; a picture (h, w, 3) as it is."""
    heights = [image for image in panels.values() if image.ndim == 2]
    top, high = scale_top(*heights), _panel_height(heights[0].shape, PANEL_INCHES)
    figure = _figure(len(panels) * PANEL_INCHES + 0.9, high + 0.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        drawn = _image(axis, image, HEIGHTS, 0, top, title)
        draw_scale_bar(axis, image.shape, metres_per_px)
    # The last panel is always a height map.
    figure.colorbar(drawn, ax=list(axes), shrink=0.85, pad=0.02, extend="max", label="canopy height (m)")
    return _png(figure)


def difference_map(image: np.ndarray, label: str, metres_per_px: float) -> bytes:
    """A signed map (h, w) in metres."""
    width = 1.5 * PANEL_INCHES
    figure = _figure(width + 1.2, _panel_height(image.shape, width) + 0.4)
    axis, top = figure.subplots(), difference_top(image)
    drawn = _image(axis, image, DIFFERENCES, -top, top, "")
    draw_scale_bar(axis, image.shape, metres_per_px)
    figure.colorbar(drawn, ax=axis, shrink=0.85, pad=0.02, extend="both", label=label)
    return _png(figure)


def class_map(codes: np.ndarray, names: Mapping[int, str], metres_per_px: float) -> bytes:
    """Class codes (h, w), 1..., 0 where unknown, with their legend."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    width = 1.5 * PANEL_INCHES
    figure = _figure(width + 1.2, _panel_height(codes.shape, width) + 0.7)
    axis, colours = figure.subplots(), CLASS_COLOURS[: len(names)]
    palette = ListedColormap((MISSING, *colours))
    axis.imshow(codes, cmap=palette, vmin=-0.5, vmax=len(names) + 0.5, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    draw_scale_bar(axis, codes.shape, metres_per_px)
    patches = [
        Patch(facecolor=c, edgecolor="#777", label=n) for c, n in zip(colours, names.values(), strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return _png(figure)


def density(counts: np.ndarray, step_m: float, x_label: str, y_label: str) -> bytes:
    """How often which pair of heights occurs: counts (x bins, y bins) of `step_m` on log colours.

    With the 1:1 line and the median of y per x.
    """
    from matplotlib.colors import LogNorm

    used = max(4, int(np.flatnonzero(counts.sum(0) + counts.sum(1)).max(initial=0)) + 2)
    counts = np.asarray(counts[:used, :used], dtype=float)
    edges = np.arange(len(counts) + 1) * step_m
    figure = _figure(5.6, 4.9)
    axis = figure.subplots()
    shown = np.where(counts > 0, counts, np.nan).T
    drawn = axis.pcolormesh(edges, edges, shown, cmap=HEIGHTS, norm=LogNorm(1, max(counts.max(), 2)))
    axis.plot(edges[[0, -1]], edges[[0, -1]], color=INK, lw=1, ls="--", label="1:1")
    centres = (edges[1:] + edges[:-1]) / 2
    rows = counts.sum(axis=1) > 0
    middle = [centres[np.searchsorted(np.cumsum(c), c.sum() / 2)] for c in counts[rows]]
    axis.plot(centres[rows], middle, color=VERMILLION, lw=1.8, label=f"median {y_label.split(' (')[0]}")
    axis.set(xlabel=x_label, ylabel=y_label, aspect="equal", facecolor=GROUND)
    axis.legend(loc="upper left", fontsize=8, framealpha=0.85)
    figure.colorbar(drawn, ax=axis, shrink=0.85, pad=0.02, label="pixels")
    return _png(figure)


def error_by_height(
    rows: Sequence[tuple[str, int, Score, Score]],
    x_label: str,
    labels: tuple[str, str] = ("bias", "mean absolute error"),
    y_label: str = "error (m)",
) -> bytes:
    """Bias and MAE (with intervals where known) per height class over the share of pixels.

    Each row: name of the class, n, bias, MAE.
    """
    figure = _figure(7.2, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for column, offset, colour, marker in ((2, -0.1, BLUE, "o"), (3, 0.1, VERMILLION, "s")):
        scores: list[Any] = [row[column] for row in rows]
        known = [
            (i, s.value, *(s.ci95 or (s.value,) * 2)) for i, s in enumerate(scores) if s.value is not None
        ]
        if known:
            at, value, low, high = np.array(known, float).T
            above.errorbar(
                at + offset, value, yerr=np.abs([low - value, high - value]), fmt=marker, color=colour,
                ms=5, lw=1.2, capsize=2.5, label=labels[column - 2],
            )  # fmt: skip
    above.axhline(0, color=INK, lw=0.8)
    above.set_ylabel(y_label)
    above.grid(axis="y", color="#ddd", lw=0.6)
    if above.get_legend_handles_labels()[0]:
        above.legend(fontsize=8, frameon=False)
    counts = np.array([row[1] for row in rows])
    below.bar(np.arange(len(rows)), 100 * counts / max(1, counts.sum()), color="#8a949c")
    below.set(ylabel="pixels (%)", xlabel=x_label)
    below.set_xticks(np.arange(len(rows)), [row[0] for row in rows])
    return _png(figure)


def points_map(lon: np.ndarray, lat: np.ndarray, error: np.ndarray, label: str) -> bytes:
    """Footprints or plots at their place, coloured by their signed error in metres."""
    figure = _figure(1.5 * PANEL_INCHES, 1.3 * PANEL_INCHES)
    axis, top = figure.subplots(), difference_top(error)
    size = float(np.clip(4000 / max(len(error), 1), 3, 60))
    drawn = axis.scatter(
        lon, lat, c=error, s=size, cmap=DIFFERENCES, vmin=-top, vmax=top, linewidths=0.2, edgecolors="#555"
    )
    axis.set_aspect(1 / max(np.cos(np.radians(float(np.mean(lat)))), 0.05))
    axis.set(xlabel="longitude", ylabel="latitude", facecolor=GROUND)
    axis.tick_params(labelsize=7)
    figure.colorbar(drawn, ax=axis, shrink=0.8, pad=0.02, extend="both", label=label)
    return _png(figure)


def _image(axis: Any, image: np.ndarray, colours: str, low: float, high: float, title: str) -> Any:
    from matplotlib import colormaps

    palette = colormaps[colours].with_extremes(bad=MISSING)
    axis.set(xticks=[], yticks=[])
    if title:
        axis.set_title(title, fontsize=10, loc="left")
    return axis.imshow(image, cmap=palette, vmin=low, vmax=high, interpolation="nearest")
