"""The embedded model on the demo scene: heights that mean something, cuts and seams that do not matter."""

from __future__ import annotations

import numpy as np

import canopy
from canopy.imagery.named import DemoSource
from canopy.imagery.open import open_imagery
from canopy.inference.backends import TorchRunner
from canopy.inference.engine import predict_grid
from canopy.inference.lattice import Lattice
from canopy.inference.output import ArraySink


def test_the_demo_scene() -> None:
    runner, source = TorchRunner(canopy.load_model("default")), open_imagery("demo")
    config = runner.model.config
    area = canopy.AOI.from_bbox((44.083, -71.296), 200)
    grid = area.grid(source.native_crs, config.gsd_m)

    def heights_of(part, **options: object) -> np.ndarray:
        sink = ArraySink(part)
        predict_grid(runner, source, part, sink, **options)  # type: ignore[arg-type]
        return sink.values[0]

    heights = heights_of(grid)
    # A part, at other windows and batch sizes: the promise is 0.01 m, the truth is float noise.
    part = heights_of(grid.window(37, 90, 60, 45), window_px=256, batch_size=3)
    np.testing.assert_allclose(part, heights[37:97, 90:135], atol=1e-3)
    # The truth, in 4 m cells: crowns are drawn to the pixel in it, no model places them so finely.
    assert isinstance(source, DemoSource) and np.isfinite(heights).all()
    truth = source.tile(grid).chm
    cell = max(1, round(4 / grid.pixel[0]))
    rows, cols = (n // cell * cell for n in truth.shape)
    coarse = [
        a[:rows, :cols].reshape(rows // cell, cell, cols // cell, cell).mean(axis=(1, 3))
        for a in (truth, heights)
    ]
    assert np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1] > 0.55
    assert abs(coarse[0].mean() - coarse[1].mean()) < 5
    # Heights change across the lines of the lattice no more than beside them.
    lattice = Lattice.of_model(config)
    for axis in (0, 1):
        step = np.abs(np.diff(heights, axis=axis)).mean(axis=1 - axis)
        place = np.arange(step.size) + 1 + grid.origin_rc[axis]
        # A crop's served part begins at a multiple of the stride and ends `overlap` pixels further on.
        on_line = (place % lattice.stride_px == 0) | (place % lattice.stride_px == lattice.overlap_px)
        for at in np.flatnonzero(on_line):
            assert step[at] < 1.4 * np.median(step[max(0, at - 8) : at + 9])
