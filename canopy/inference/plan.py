"""Which crops of the image the network sees, and in which order, for any output grid.

There is one lattice of crops per (CRS, pixel size, phase): crop `k` along an axis serves the pixels
`[k * stride, k * stride + served)`, counted on the global pixel index of `Grid.origin_rc`, and reads `margin`
pixels more on either side. A pixel is the weighted mean of ALL lattice crops that serve it, and a crop is
always read in full, also beyond the area asked for. Its value therefore cannot depend on how an area was cut.

Work is done in windows of `block x block` crops, left to right and top to bottom. Every crop is predicted
exactly once per run: what a window's last crops add to its right and lower neighbours is carried over
(see `blend.Canvas`), so windows cost no recomputed crops. The only cost of the lattice is
`(crop / stride)^2` pixels seen per pixel mapped, plus the crops that hang over the area's edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from canopy.errors import ConfigError

if TYPE_CHECKING:
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
    def of(cls, crop_px: int, patch_px: int = 16) -> Lattice:
        """The default lattice of a model: stride and crop are multiples of its patch.

        A multiple of the patch as stride makes the token grids of neighbouring crops coincide, so that what
        is left of the patch pattern is the same in both.
        """
        # Three eighths: with a quarter, crops that saw different surroundings show as faint squares in closed
        # forest at an 8-bit stretch; with half, nothing more is gained (embedded model, docs/predict.md).
        overlap = max(patch_px, round(crop_px * 3 / 8 / patch_px) * patch_px)
        if crop_px < 2 * patch_px:
            return cls(crop_px, crop_px, 0)
        # The taper gives the first tenth of the overlap under 3 % of the weight: a wide ramp hides seams
        # better than a wide margin does (measured at equal cost).
        return cls(crop_px, crop_px - overlap, overlap // 16)

    @classmethod
    def of_model(cls, config: Any) -> Lattice:
        """The lattice that a model's `config` asks for by `overlap_px` and `margin_px`, else the default one.

        A `config` needs no more than `crop_px` and `patch_px`.
        """
        overlap, margin = getattr(config, "overlap_px", 0), getattr(config, "margin_px", 0)
        if not overlap:
            return cls.of(config.crop_px, config.patch_px)
        return cls(config.crop_px, config.crop_px - overlap, margin or overlap // 16)

    @property
    def served_px(self) -> int:
        """Side of a crop's inner part, whose pixels enter the map."""
        return self.crop_px - 2 * self.margin_px

    @property
    def overlap_px(self) -> int:
        """Pixels along an axis that two neighbours both serve."""
        return self.served_px - self.stride_px

    @property
    def waste(self) -> float:
        """Pixels the network sees per pixel mapped, on a large area."""
        return (self.crop_px / self.stride_px) ** 2

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
    def final_px(self) -> int:
        return self.final[1] - self.final[0]


@dataclass(frozen=True)
class WorkWindow:
    """`rows.crops x cols.crops` crops that are read with one request; (row, column) order throughout."""

    rows: Span
    cols: Span
    is_row_start: bool


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
        final = (min(max(served_from, 0), length), max(0, min(done_to, length)))
        spans.append(Span(part, served_from, final))
    return tuple(spans)
