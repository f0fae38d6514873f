"""One rule for the seams: how the crops that serve a pixel are averaged.

The taper of a crop rises over the overlap as sin^2 and falls as cos^2, so the weights of all lattice crops at
a pixel add up to exactly one and no division by a weight sum is needed. Weights are strictly positive on the
whole served part; sums run in float64, so that the order in which windows arrive cannot move a float32
height.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from canopy.inference.plan import Lattice, Plan, WorkWindow

if TYPE_CHECKING:
    import torch


def taper(lattice: Lattice) -> np.ndarray:
    """Weights (served_px,) float64 of one crop along one axis, all > 0, summing to 1 over the lattice."""
    overlap = lattice.overlap_px
    weights = np.ones(lattice.served_px)
    if overlap:
        # Half-pixel offset: the first pixel of the ramp is not zero, the last is not one.
        rise = np.sin(0.5 * np.pi * (np.arange(overlap) + 0.5) / overlap) ** 2
        weights[:overlap] = rise
        weights[-overlap:] = rise[::-1]
    return weights


class Canvas:
    """Sums weighted crops and hands out finished pixels, window after window in plan order.

    Everything stays on `device`: a CPU, or the GPU that predicts, so that only finished pixels are
    downloaded. Memory is one window plus a strip of `overlap` rows as wide as the map: what the crops of
    one row of windows add to the next. (84 rows of 20,000 float64 pixels are 13 MB.)
    """

    def __init__(self, plan: Plan, layers: int = 1, device: torch.device | str = "cpu") -> None:
        import torch

        self.device = torch.device(device)
        self._lattice, self._layers = plan.lattice, layers
        self._first_col = plan.cols[0].served_from
        weights = torch.from_numpy(taper(plan.lattice)).to(self.device)
        self._weights = weights[:, None] * weights[None, :]
        width = sum(len(span.crops) for span in plan.cols) * plan.lattice.stride_px
        self._carry_down = self._zeros(plan.lattice.overlap_px, width)
        self._carry_right: torch.Tensor | None = None
        self._sum = self._zeros(0, 0)
        self._window: WorkWindow | None = None

    def _zeros(self, height: int, width: int) -> torch.Tensor:
        import torch

        return torch.zeros((self._layers, height, width), dtype=torch.float64, device=self.device)

    def begin(self, window: WorkWindow) -> None:
        """Start a window with what its upper and left neighbours left over for it."""
        stride, overlap = self._lattice.stride_px, self._lattice.overlap_px
        height, width = len(window.rows.crops) * stride, len(window.cols.crops) * stride
        shape = (self._layers, height + overlap, width + overlap)
        # Fresh pages cost more than the sums themselves: most windows have one size.
        self._sum = self._sum.zero_() if self._sum.shape == shape else self._zeros(*shape[1:])
        left = window.cols.served_from - self._first_col
        self._sum[:, :overlap, :width] += self._carry_down[..., left : left + width]
        if self._carry_right is not None and not window.is_row_start:
            self._sum[..., :overlap] += self._carry_right
        self._window = window

    def add(self, row: int, col: int, maps: torch.Tensor) -> None:
        """Add the crop (`row`, `col`), counted within the window; `maps` is (layers, crop_px, crop_px)."""
        lattice = self._lattice
        inner = slice(lattice.margin_px, lattice.margin_px + lattice.served_px)
        top, left = row * lattice.stride_px, col * lattice.stride_px
        place = self._sum[:, top : top + lattice.served_px, left : left + lattice.served_px]
        place.addcmul_(self._weights, maps[..., inner, inner].double())

    def finish(self) -> torch.Tensor:
        """The window's layers (layers, final rows, final columns) float32; the rest is carried over."""
        import torch

        window, stride = self._window, self._lattice.stride_px
        if window is None:
            raise RuntimeError("finish() needs begin() first")
        height, width = len(window.rows.crops) * stride, len(window.cols.crops) * stride
        left = window.cols.served_from - self._first_col
        self._carry_down[..., left : left + width] = self._sum[:, height:, :width]
        self._carry_right = self._sum[..., width:].clone()
        top, side = (
            span.final[0] - span.served_from if span.final_px > 0 else 0
            for span in (window.rows, window.cols)
        )
        bottom, right = top + max(0, window.rows.final_px), side + max(0, window.cols.final_px)
        self._window = None
        return self._sum[:, top:bottom, side:right].to(torch.float32)
