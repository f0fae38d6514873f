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

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from canopy.geo.grid import Grid


Corner = tuple[int, int]
"""Row and column of a crop, counted within its window."""
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

    def crop_slices(self, corner: Corner) -> tuple[slice, slice]:
        """Rows and columns of a window that the crop in its row and column of crops reads."""
        top, left = (at * self.stride_px for at in corner)
        return slice(top, top + self.crop_px), slice(left, left + self.crop_px)

    def served_slices(self, corner: Corner) -> tuple[slice, slice]:
        """Rows and columns of a window that the crop serves."""
        top, left = (at * self.stride_px + self.margin_px for at in corner)
        return slice(top, top + self.served_px), slice(left, left + self.served_px)

    def crops_serving(self, start: int, stop: int) -> range:
        """Indices of the crops that serve at least one pixel of `[start, stop)` (global pixel indices)."""
        return range((start - self.served_px) // self.stride_px + 1, (stop - 1) // self.stride_px + 1)


@dataclass(frozen=True)
class Window:
    """`rows x cols` crops, by their indices on the lattice, that are read with one request."""

    rows: range
    cols: range

    @property
    def corners(self) -> list[Corner]:
        """Its crops, counted within it."""
        return [(row, col) for row in range(len(self.rows)) for col in range(len(self.cols))]


@dataclass(frozen=True)
class Plan:
    """All windows that cover `grid`, in the order they must be done: `rows` of crops times `cols`."""

    grid: Grid
    lattice: Lattice
    rows: tuple[range, ...]
    cols: tuple[range, ...]

    def __iter__(self) -> Iterator[Window]:
        return itertools.starmap(Window, itertools.product(self.rows, self.cols))

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    @property
    def n_crops(self) -> int:
        """Crops to predict if every one holds a valid pixel."""
        return sum(map(len, self.rows)) * sum(map(len, self.cols))

    def offset(self, window: Window) -> tuple[int, int]:
        """Row and column in the grid, maybe outside of it, of the first pixel that the window's crops see."""
        stride, margin = self.lattice.stride_px, self.lattice.margin_px
        row, col = self.grid.origin_rc
        return window.rows.start * stride - margin - row, window.cols.start * stride - margin - col

    def read_grid(self, window: Window) -> Grid:
        """The pixels that the window's crops see, margins included; may reach beyond the image."""
        lattice, crops = self.lattice, (len(window.rows), len(window.cols))
        return self.grid.window(
            *self.offset(window), *((n - 1) * lattice.stride_px + lattice.crop_px for n in crops)
        )

    def inside(self, window: Window) -> tuple[slice, slice]:
        """Rows and columns of `read_grid(window)` that lie in the grid."""
        rows, cols = (
            slice(max(0, -start), max(0, length - start))
            for start, length in zip(self.offset(window), self.grid.shape, strict=True)
        )
        return rows, cols

    def final(self, window: Window) -> tuple[slice, slice]:
        """Rows and columns of `read_grid(window)`, in the grid, that are complete after the window."""
        stride, margin = self.lattice.stride_px, self.lattice.margin_px
        rows, cols = (
            slice(max(inside.start, margin), max(inside.start, margin, min(inside.stop, margin + n * stride)))
            for inside, n in zip(self.inside(window), (len(window.rows), len(window.cols)), strict=True)
        )
        return rows, cols


def plan_windows(grid: Grid, lattice: Lattice, window_px: int = WINDOW_PX) -> Plan:
    """Cut the lattice crops that serve `grid` into windows of about `window_px` a side."""
    block = max(1, window_px // lattice.stride_px)
    rows, cols = (
        tuple(range(k, min(k + block, crops.stop)) for k in range(crops.start, crops.stop, block))
        for crops in (
            lattice.crops_serving(start, start + length)
            for start, length in zip(grid.origin_rc, grid.shape, strict=True)
        )
    )
    return Plan(grid, lattice, rows, cols)


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
    downloaded. Memory is one window, and the strips that windows share with the next: 96 rows as wide as the
    map, or so. Windows whose crops nobody wants may be left out; no wanted pixel lies on what they pass on.
    """

    def __init__(self, plan: Plan, layers: int = 1, device: torch.device | str = "cpu") -> None:
        import torch

        self._plan, self.device, self._layers = plan, torch.device(device), layers
        weights = torch.from_numpy(taper(plan.lattice)).to(self.device)
        self._weights = weights[:, None] * weights[None, :]
        self._sum = torch.zeros(0)
        # What is left for a window, by its first row and column of crops.
        self._below: dict[tuple[int, int], torch.Tensor] = {}
        self._right: dict[tuple[int, int], torch.Tensor] = {}

    def begin(self, window: Window) -> None:
        """Start a window with what its upper and left neighbours left for it."""
        import torch

        self._window, place = window, (window.rows.start, window.cols.start)
        stride, overlap = self._plan.lattice.stride_px, self._plan.lattice.overlap_px
        height, width = (len(crops) * stride + overlap for crops in (window.rows, window.cols))
        shape = (self._layers, height, width)
        # Fresh pages cost more than the sums themselves: most windows have one size.
        same = self._sum.shape == shape
        self._sum = self._sum.zero_() if same else torch.zeros(shape, dtype=torch.float64, device=self.device)
        for left in (self._below.pop(place, None), self._right.get(place)):
            if left is not None:
                self._sum[:, : left.shape[1], : left.shape[2]] += left

    def add(self, corner: Corner, maps: torch.Tensor) -> None:
        """Add a crop, counted within the window; `maps` is (layers, crop_px, crop_px)."""
        lattice = self._plan.lattice
        top, left = (at * lattice.stride_px for at in corner)
        place = self._sum[:, top : top + lattice.served_px, left : left + lattice.served_px]
        served = slice(lattice.margin_px, lattice.margin_px + lattice.served_px)
        place.addcmul_(self._weights, maps[:, served, served].double())

    def finish(self) -> torch.Tensor:
        """The window's layers (layers, final rows, final columns) float32; the rest is carried over."""
        import torch

        rows, cols, stride = self._window.rows, self._window.cols, self._plan.lattice.stride_px
        height, width = len(rows) * stride, len(cols) * stride
        self._below = {place: left for place, left in self._below.items() if place[0] >= rows.start}
        self._below[rows.stop, cols.start] = self._sum[:, height:, :width].clone()
        self._right = {(rows.start, cols.stop): self._sum[..., width:].clone()}
        margin, final = self._plan.lattice.margin_px, self._plan.final(self._window)
        top, left = (slice(part.start - margin, part.stop - margin) for part in final)
        return self._sum[:, top, left].to(torch.float32)


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
