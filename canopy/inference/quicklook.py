"""A picture of a height map: for a glance, and for mailing it to someone without a GIS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from canopy.files import replacing
from canopy.geo.grid import Grid
from canopy.geo.scale_bar import draw_scale_bar

LONG_SIDE_PX = 1400
NODATA_COLOUR = "#c9c9c9"
# Dark ground to bright crowns, even in perceived lightness, readable for the colour-blind and in grey.
COLOURS = "viridis"


def write_quicklook(map_path: Path, png_path: Path, *, title: str, subtitle: str = "") -> None:
    """Draw band 1 of a height map with a colour bar in metres and a scale bar.

    Large maps are read through their overviews, so memory does not grow with the map. Missing is grey.

    Raises:
        OutputError: the picture cannot be written; no partial file is left.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights, grid = _overview(map_path)
    top = _scale_top(heights)
    ratio = heights.shape[0] / heights.shape[1]
    width = 8.0
    figure = Figure(
        figsize=(width + 1.1, float(np.clip(width * ratio, 2.0, 16.0)) + 0.9), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps[COLOURS].with_extremes(bad=NODATA_COLOUR)
    image = axes.imshow(heights, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(subtitle, fontsize=8, loc="left", color="0.35")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, extend="max")
    bar.set_label("canopy height (m)")
    draw_scale_bar(axes, heights.shape, grid.gsd_m * grid.width / heights.shape[1])
    with replacing(png_path, "cannot write the quicklook") as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})


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


def _scale_top(heights: np.ndarray) -> float:
    """Upper end of the colours: the 99.5th percentile rounded up to 5 m, at least 5 m."""
    known = heights[np.isfinite(heights)]
    if known.size == 0:
        return 5.0
    return float(max(5.0, np.ceil(np.percentile(known, 99.5) / 5) * 5))
