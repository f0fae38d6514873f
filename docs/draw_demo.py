"""Draw docs/demo.png, the README's picture: `make demo && .venv/bin/python docs/draw_demo.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from canopy.geo.reading import read_raster
from canopy.imagery.named import DemoSource


def main() -> None:
    chm = read_raster("demo/chm.tif")
    scene = DemoSource().tile(chm.grid)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(np.moveaxis(scene.rgb, 0, -1))
    for place, heights in ((axes[1], chm.values[0]), (axes[2], scene.chm)):
        drawn = place.imshow(heights, cmap="viridis", vmin=0, vmax=30)
    titles = ("image (synthetic, 1 km)", "predicted canopy height", "truth")
    for place, title in zip(axes, titles, strict=True):
        place.set_title(title, loc="left", fontsize=11)
        place.set_axis_off()
    figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.01, extend="max").set_label("metres")
    figure.savefig(Path(__file__).with_name("demo.png"), dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
