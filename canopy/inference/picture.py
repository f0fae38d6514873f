"""The picture of a map, for a glance or a report: the image beside the heights, and what there is to know.

A model's colours are always the same, so that two maps of it can be laid side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import CanopyError
from canopy.files import replacing
from canopy.geo.grid import Grid
from canopy.inference.layers import told, top_of_range
from canopy.inference.output import Scenes, dates_text, imagery_text
from canopy.runtime import log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from canopy.imagery.base import ImagerySource
    from canopy.inference.inputs import Inputs


LONG_SIDE_PX = 1400
# Of an image larger than this only the heights are drawn: it would be read a second time.
MOST_IMAGE_PX = 4e8
NODATA_COLOUR = "#c9c9c9"
# Dark ground to bright crowns, even in perceived lightness, readable for the colour-blind and in grey.
COLOURS = "viridis"
INK, WARNING = "#222222", "#a33b00"


def expected_error(card: Mapping[str, Any]) -> str:
    """How far a model's heights are off on images that it was tested on, in words; empty where unknown."""
    if card.get("expected_error"):
        return str(card["expected_error"])
    places = [row for row in dict(card.get("test") or {}).values() if isinstance(row, Mapping)]
    known = [(row["mae_m"], row["n"]) for row in places if {"mae_m", "n"} <= row.keys()]
    if not known:
        return ""
    mean = sum(mae * n for mae, n in known) / sum(n for _, n in known)
    return f"mean error {mean:.1f} m on test images of other places"


def draw_map(
    map_path: Path,
    png_path: Path,
    made: Inputs,
    scenes: Scenes,
    findings: Mapping[str, float],
    with_image: bool = True,
) -> None:
    """The picture of a map of `made`, with what is known of it; see `write_quicklook`."""
    card = made.model.card
    error, licence = expected_error(card), card.get("licence") or "not stated"
    write_quicklook(
        map_path,
        png_path,
        title=f"Canopy height, {made.aoi.describe()}",
        top_m=top_of_range(made.extras.tallest_m),
        lines=[
            f"imagery: {imagery_text(scenes)[:120]}; date: {dates_text(scenes.dates)}",
            *([f"imagery: {made.source.terms.text}"] if made.source.terms else []),
            f"model: {made.model_name}, licence {licence}" + (f"; {error}" if error else ""),
        ],
        warnings=told(findings, made.extras),
        source=made.source if with_image else None,
    )


def write_quicklook(
    map_path: Path,
    png_path: Path,
    *,
    title: str,
    top_m: float = 40.0,
    lines: Sequence[str] = (),
    warnings: Sequence[str] = (),
    source: ImagerySource | None = None,
) -> None:
    """Draw band 1 of a height map, and the image beside it, with scale, north, and lines of text.

    Large maps are read through their overviews, so memory does not grow with the map. Missing is grey.

    Args:
        top_m: what the brightest colour stands for.
        lines: below the picture: imagery, date, model, licence, error.
        warnings: what the reader has to know first: above the lines, in colour.
        source: the imagery; None leaves it out.

    Raises:
        OutputError: the picture cannot be written; no partial file is left.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights, grid = _overview(map_path)
    image = None if source is None else _image(source, grid, heights.shape)
    # Cells of a grid in degrees are not square on the ground.
    x_m, y_m = (grid.gsd_m * pixel / math.sqrt(math.prod(grid.pixel)) for pixel in grid.pixel)
    tall = float(np.clip(y_m * grid.height / (x_m * grid.width), 0.1, 10.0))
    side_by_side = image is not None and tall > 0.6
    panels = 1 if image is None else 2
    width = 11.0
    panel_in = width / (panels if side_by_side else 1) * 0.94
    height = min(panel_in * tall, 14.0) * (1 if side_by_side else panels)
    text = [*(f"! {line}" for line in warnings), *lines]
    figure = Figure(figsize=(width, height + 1.1 + 0.21 * len(text)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(height + 0.9, 0.2 + 0.21 * len(text)))
    top, bottom = parts
    top.suptitle(title, fontsize=13, x=0.004, ha="left", color=INK, fontweight="bold")
    cells = top.subplots(1, panels) if side_by_side else top.subplots(panels, 1)
    axes = [cells] if panels == 1 else list(cells)
    shape = {"extent": (0, x_m * grid.width, 0, y_m * grid.height), "interpolation": "nearest"}
    if image is not None:
        axes[0].imshow(image, **shape)
        axes[0].set_title("image", fontsize=9, loc="left", color="0.35")
    colours = colormaps[COLOURS].with_extremes(bad=NODATA_COLOUR)
    drawn = axes[-1].imshow(heights, cmap=colours, vmin=0, vmax=top_m, **shape)
    axes[-1].set_title("canopy height, metres", fontsize=9, loc="left", color="0.35")
    for one in axes:
        one.set_xticks([])
        one.set_yticks([])
    top.colorbar(drawn, ax=axes, shrink=0.8, pad=0.015, aspect=30, extend="max")
    draw_scale_bar(axes[-1], heights.shape, x_m * grid.width / heights.shape[1])
    _draw_north(axes[-1])
    for number, line in enumerate(text):
        warns = number < len(warnings)
        bottom.text(
            0.004, 1 - (number + 0.7) / (len(text) + 0.5), line, fontsize=9 if warns else 8, va="center",
            color=WARNING if warns else "0.3", fontweight="bold" if warns else "normal", wrap=True,
        )  # fmt: skip
    with replacing(png_path, "cannot write the quicklook") as part:
        figure.savefig(part, format="png", dpi=130, metadata={"Software": None})


def _overview(path: Path) -> tuple[np.ndarray, Grid]:
    """Band 1 in metres with NaN where missing, at most `LONG_SIDE_PX` a side, and the map's full grid."""
    import rasterio
    from rasterio.enums import Resampling

    with rasterio.open(path) as dataset:
        shrink = max(1.0, max(dataset.height, dataset.width) / LONG_SIDE_PX)
        shape = (max(1, round(dataset.height / shrink)), max(1, round(dataset.width / shrink)))
        band = dataset.read(1, out_shape=shape, masked=True, resampling=Resampling.average)
        heights = np.ma.filled(band.astype(np.float32), np.nan) * dataset.scales[0] + dataset.offsets[0]
        return heights, Grid.of(dataset.crs.to_wkt(), dataset.transform, dataset.shape)


def _image(source: ImagerySource, grid: Grid, shape: tuple[int, ...]) -> np.ndarray | None:
    """The imagery (h, w, 3) on the map's ground, missing in grey; None where it would take too long."""
    if grid.height * grid.width > MOST_IMAGE_PX:
        return None
    pixel = (grid.pixel[0] * grid.width / shape[1], grid.pixel[1] * grid.height / shape[0])
    coarse = (pixel[0], 0, grid.bounds[0], 0, -pixel[1], grid.bounds[3])
    try:
        imagery = source.read(Grid.of(grid.crs, coarse, (shape[0], shape[1])))
    except CanopyError as error:  # of a damaged part, whose tiles failed, too
        log.info(f"the picture has no image: {error}")
        return None
    missing = np.array([int(NODATA_COLOUR[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    # Images of 11 bits and more are dark on a screen: the same stretch for all channels, never darker.
    known = imagery.rgb[:, imagery.valid]
    bright = float(np.clip(np.nanpercentile(known, 99.5), 0.1, 1.0)) if known.size else 1.0
    shown = np.clip(np.nan_to_num(np.moveaxis(imagery.rgb, 0, -1)) / bright, 0, 1)
    return np.where(imagery.valid[..., None], shown, missing)


def _draw_north(axes: Axes) -> None:
    """An arrow to the north, in the upper right corner."""
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 2.0}
    axes.text(
        0.97, 0.965, "N\n\N{BLACK UP-POINTING TRIANGLE}", transform=axes.transAxes, color="white",
        fontsize=8, ha="right", va="top", linespacing=0.9, bbox=box,
    )  # fmt: skip


def draw_scale_bar(axes: Axes, shape: tuple[int, ...], metres_per_px: float) -> None:
    """A bar of a round length, about a fifth of a picture (h, w), in its lower left corner."""
    length_m = round_length(shape[1] * metres_per_px / 5)
    label = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
    x, y, width = 0.03, 0.035, length_m / (metres_per_px * shape[1])
    for colour, thick in (("black", 5), ("white", 3)):
        axes.plot(
            [x, x + width], [y, y], transform=axes.transAxes, color=colour, lw=thick, solid_capstyle="butt"
        )
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y + 0.02, label, transform=axes.transAxes, color="white", fontsize=8, va="bottom", bbox=box)


def round_length(metres: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not above `metres`.

    >>> round_length(437), round_length(0.13)
    (200.0, 0.1)
    """
    power = 10.0 ** np.floor(np.log10(metres))
    return float(max(step * power for step in (1, 2, 5) if step * power <= metres * (1 + 1e-9)))
