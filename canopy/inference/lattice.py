"""Which crops of an image the network sees, and how the crops that serve a pixel are averaged.

There is one lattice of crops per (CRS, pixel size, phase): crop `k` along an axis serves the pixels
`[k * stride, k * stride + served)`, counted on the global pixel index of `Grid.origin_rc`, and reads `margin`
pixels more on either side. A pixel is the weighted mean of ALL lattice crops that serve it, and a crop is
always read in full, also beyond the area asked for. Its value therefore cannot depend on how an area was cut.

Work is done in windows of `block x block` crops, left to right and top to bottom. Every crop is predicted
exactly once per run: what a window's last crops add to its right and lower neighbours is carried over (see
`Canvas`), so windows cost no recomputed crops. The only cost of the lattice is `(crop / stride)^2` pixels
seen per pixel mapped, plus the crops that hang over the area's edge.

The taper of a crop rises over the overlap as sin^2 and falls as cos^2, so the weights of all lattice crops at
a pixel add up to exactly one and no division by a weight sum is needed. Weights are strictly positive on the
whole served part; sums run in float64, so that the order in which windows arrive cannot move a float32
height.

`predict_array` is for images without a place on the ground, such as training chips: their crops are spread
evenly inside the image. Only numpy and torch are needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from canopy.geo.grid import Grid


# A window's imagery is held in memory several times (read ahead, in work, being written): about 1500 px
# a side keeps that below ~50 MB each while a warp still serves dozens of crops.
WINDOW_PX = 1536


@dataclass(frozen=True)
class Lattice:
    """Crop geometry along both axes, in pixels.

    Attributes:
        crop_px: side of what the network sees.
        stride_px: distance between neighbouring crops.
        margin_px: outermost pixels of a crop that never reach the map (they lack context on one side).
    """

    crop_px: int
    stride_px: int
    margin_px: int

    def __post_init__(self) -> None:
        if self.margin_px < 0 or not 0 < self.stride_px <= self.served_px or self.overlap_px > self.stride_px:
            raise ConfigError(
                f"crop {self.crop_px}, stride {self.stride_px}, margin {self.margin_px} px leave gaps or "
                "overlap more than twice",
                expected="crop - 2 * margin between stride and 2 * stride",
            )

    @classmethod
    def of_model(cls, config: Any) -> Lattice:
        """The lattice that a model's `config` asks for by `overlap_px` and `margin_px`, else the default one.

        A `config` needs no more than `crop_px` and `patch_px`. By default stride and crop are multiples of
        the patch: so the token grids of neighbouring crops coincide, and what is left of the patch pattern is
        the same in both.
        """
        crop_px, patch_px = config.crop_px, config.patch_px
        overlap, margin = getattr(config, "overlap_px", 0), getattr(config, "margin_px", 0)
        if not overlap and crop_px < 2 * patch_px:
            return cls(crop_px, crop_px, 0)
        # Three eighths: with a quarter, crops that saw different surroundings show as faint squares in closed
        # forest at an 8-bit stretch; with half, nothing more is gained (embedded model, docs/predict.md).
        overlap = overlap or max(patch_px, round(crop_px * 3 / 8 / patch_px) * patch_px)
        # The taper gives the first tenth of the overlap under 3 % of the weight: a wide ramp hides seams
        # better than a wide margin does (measured at equal cost).
        return cls(crop_px, crop_px - overlap, margin or overlap // 16)

    @property
    def served_px(self) -> int:
        """Side of a crop's inner part, whose pixels enter the map."""
        return self.crop_px - 2 * self.margin_px

    @property
    def overlap_px(self) -> int:
        """Pixels along an axis that two neighbours both serve."""
        return self.served_px - self.stride_px

    def crop_slices(self, corner: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a window that the crop in its row and column of crops reads."""
        top, left = (at * self.stride_px for at in corner)
        return slice(top, top + self.crop_px), slice(left, left + self.crop_px)

    def served_slices(self, corner: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a window that the crop serves."""
        top, left = (at * self.stride_px + self.margin_px for at in corner)
        return slice(top, top + self.served_px), slice(left, left + self.served_px)

    def crops_serving(self, start: int, stop: int) -> range:
        """Indices of the crops that serve at least one pixel of `[start, stop)` (global pixel indices)."""
        return range((start - self.served_px) // self.stride_px + 1, (stop - 1) // self.stride_px + 1)


@dataclass(frozen=True)
class Span:
    """A window along one axis; offsets are in pixels of the output grid and may lie outside it.

    Attributes:
        crops: lattice indices predicted here.
        served_from: offset of the first crop's served part.
        final: offsets `[start, stop)`, inside the grid, of the pixels that are complete after this window.
    """

    crops: range
    served_from: int
    final: tuple[int, int]

    @property
    def final_slice(self) -> slice:
        """The complete pixels, counted from the first crop's served part."""
        return slice(self.final[0] - self.served_from, self.final[1] - self.served_from)


@dataclass(frozen=True)
class WorkWindow:
    """`rows.crops x cols.crops` crops that are read with one request; (row, column) order throughout."""

    rows: Span
    cols: Span
    is_row_start: bool

    @property
    def n_crops(self) -> int:
        return len(self.rows.crops) * len(self.cols.crops)


@dataclass(frozen=True)
class Plan:
    """All windows that cover `grid`, in the order they must be done."""

    grid: Grid
    lattice: Lattice
    rows: tuple[Span, ...]
    cols: tuple[Span, ...]

    def __iter__(self) -> Iterator[WorkWindow]:
        for row in self.rows:
            for index, col in enumerate(self.cols):
                yield WorkWindow(row, col, is_row_start=index == 0)

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    @property
    def n_crops(self) -> int:
        """Crops to predict if every one holds a valid pixel."""
        return sum(len(r.crops) for r in self.rows) * sum(len(c.crops) for c in self.cols)

    def read_grid(self, window: WorkWindow) -> Grid:
        """The pixels that the window's crops see, margins included; may reach beyond the image."""
        lattice = self.lattice
        height, width = (
            (len(span.crops) - 1) * lattice.stride_px + lattice.crop_px for span in (window.rows, window.cols)
        )
        margin = lattice.margin_px
        return self.grid.window(
            window.rows.served_from - margin, window.cols.served_from - margin, height, width
        )

    def inside(self, window: WorkWindow) -> tuple[slice, slice]:
        """Rows and columns of `read_grid(window)` that lie in the grid."""
        first = [span.served_from - self.lattice.margin_px for span in (window.rows, window.cols)]
        rows, cols = (
            slice(max(0, -start), max(0, length - start))
            for start, length in zip(first, (self.grid.height, self.grid.width), strict=True)
        )
        return rows, cols

    def final_slices(self, window: WorkWindow) -> tuple[slice, slice]:
        """Rows and columns of `read_grid(window)` that are complete after the window."""
        rows, cols = window.rows.final_slice, window.cols.final_slice
        margin = self.lattice.margin_px
        return (
            slice(rows.start + margin, rows.stop + margin),
            slice(cols.start + margin, cols.stop + margin),
        )


def plan_windows(grid: Grid, lattice: Lattice, window_px: int = WINDOW_PX) -> Plan:
    """Cut the lattice crops that serve `grid` into windows of about `window_px` a side."""
    block = max(1, window_px // lattice.stride_px)
    row, col = grid.origin_rc
    return Plan(
        grid,
        lattice,
        _spans(row, grid.height, lattice, block),
        _spans(col, grid.width, lattice, block),
    )


def _spans(origin: int, length: int, lattice: Lattice, block: int) -> tuple[Span, ...]:
    """Windows along one axis; `origin` is the global index of the grid's first pixel."""
    crops = lattice.crops_serving(origin, origin + length)
    spans = []
    for start in range(crops.start, crops.stop, block):
        part = range(start, min(start + block, crops.stop))
        served_from = part.start * lattice.stride_px - origin
        done_to = part.stop * lattice.stride_px - origin
        first = min(max(served_from, 0), length)
        final = (first, max(first, min(done_to, length)))
        spans.append(Span(part, served_from, final))
    return tuple(spans)


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
        """Start a window with what its upper and left neighbours left for it; nothing if it has begun."""
        if window is self._window:
            return
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
        self._window = None
        return self._sum[:, window.rows.final_slice, window.cols.final_slice].to(torch.float32)


def predict_array(
    network: Callable[[np.ndarray], np.ndarray],
    rgb: np.ndarray,
    valid: np.ndarray,
    crop_px: int,
    overlap_px: float,
    batch: int = 4,
) -> np.ndarray:
    """What a network says of one whole image, from crops inside it that overlap by `overlap_px` or more.

    Weights rise linearly over the overlap, and are divided by their sum. Every crop sees invalid pixels, and
    what an image smaller than a crop lacks, filled from itself alone, as in a map.

    Args:
        network: crops (n, 3, crop_px, crop_px) float32 in 0..1, finite -> layers (n, l, crop_px, crop_px).
        rgb: (3, H, W) in 0..1, anything where not `valid` (H, W).
        batch: crops at a time.

    Returns:
        Layers (l, H, W) float64; also where the image is not valid.
    """
    H, W = valid.shape
    ramp = np.minimum(np.arange(crop_px) + 1.0, np.arange(crop_px, 0, -1.0)) / max(overlap_px, 1.0)
    weight = np.minimum.outer(ramp, ramp).clip(max=1.0)
    total, weights = np.zeros((0, H, W)), np.zeros((H, W))
    rows, cols = (_spread(length, crop_px, overlap_px) for length in (H, W))
    corners = [(row, col) for row in rows for col in cols]
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        places = [np.s_[row : row + crop_px, col : col + crop_px] for row, col in part]
        layers = network(np.stack([_filled(rgb[:, *place], valid[place], crop_px) for place in places]))
        if first == 0:
            total = np.zeros((layers.shape[1], H, W))
        for place, maps in zip(places, layers, strict=True):
            height, width = weights[place].shape
            total[:, *place] += (maps * weight)[:, :height, :width]
            weights[place] += weight[:height, :width]
    return total / weights


def _spread(length: int, crop_px: int, overlap_px: float) -> list[int]:
    """First pixels of the crops along an axis, evenly spread; just 0 in an image no longer than a crop."""
    if length <= crop_px:
        return [0]
    count = int(np.ceil((length - crop_px) / (crop_px - overlap_px))) + 1
    return [round(start) for start in np.linspace(0, length - crop_px, count)]


def _filled(rgb: np.ndarray, valid: np.ndarray, side: int) -> np.ndarray:
    """A part of an image as a crop (3, side, side), its holes and what lies beyond the image filled."""
    from canopy.models.height import fill_invalid

    beyond = tuple((0, side - length) for length in valid.shape)
    return fill_invalid(np.pad(rgb, ((0, 0), *beyond)), np.pad(valid, beyond))
