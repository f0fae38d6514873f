"""Windows of imagery, read ahead and made ready for the network while it works on others.

Everything here runs in reader threads: pixels, which of them are wanted, which crops have work to do, and
what the network sees where an image has holes. The thread that feeds the network only cuts and stacks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from canopy.errors import ImageryError
from canopy.inference.plan import Lattice, Plan, WorkWindow

if TYPE_CHECKING:
    from canopy.geo.aoi import AOI
    from canopy.geo.grid import Grid
    from canopy.inference.transfer import Packed, Transfer
    from canopy.sources.imagery import Imagery

Place = tuple[int, int]
"""Row and column of a crop, counted within its window."""


class Source(Protocol):
    """The part of `ImagerySource` that prediction needs."""

    def read(self, grid: Grid) -> Imagery: ...


@dataclass(frozen=True)
class Pixels:
    """A window as read: everything on `plan.read_grid(window)`.

    Attributes:
        rgb: (3, h, w) float32 in 0..1, anything where not valid; packed: the same, ready for the device.
        valid: (h, w), where there is an image.
        wanted: (h, w), where a height is due: valid, inside the grid and inside the area.
        date: (h, w) days since 1970-01-01, 0 where unknown.
        crops: places with wanted pixels.
        filled: of those, the crops that have invalid pixels, with plausible ones there: (3, crop, crop).
    """

    rgb: np.ndarray
    packed: Packed
    valid: np.ndarray
    wanted: np.ndarray
    date: np.ndarray
    crops: tuple[Place, ...]
    filled: dict[Place, np.ndarray]


def read_ahead(
    plan: Plan,
    source: Source,
    aoi: AOI | None,
    transfer: Transfer,
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[tuple[WorkWindow, Pixels | None]]:
    """The plan's windows in order with their pixels, at most `ahead` of them read in advance.

    Pixels are None where the area has none of the window.
    """
    pending: deque[tuple[WorkWindow, Future[Pixels | None]]] = deque()
    for window in plan:
        pending.append((window, pool.submit(_read, window, plan, source, aoi, transfer)))
        if len(pending) > ahead:
            window_done, future = pending.popleft()
            yield window_done, future.result()
    while pending:
        window_done, future = pending.popleft()
        yield window_done, future.result()


def _read(
    window: WorkWindow, plan: Plan, source: Source, aoi: AOI | None, transfer: Transfer
) -> Pixels | None:
    """The window's pixels; None where the area has none of it (nothing is read then)."""
    grid = plan.read_grid(window)
    inside = _inside(window, plan)
    if aoi is not None and not aoi.is_box:
        inside &= aoi.mask(grid)
    if not inside.any():
        return None
    imagery = source.read(grid)
    if imagery.rgb.shape != (3, *grid.shape) or imagery.valid.shape != grid.shape:
        raise ImageryError(
            f"the source gave {imagery.rgb.shape} RGB and {imagery.valid.shape} validity",
            where=getattr(source, "name", None),
            expected=f"the window's shape (3, {grid.height}, {grid.width})",
        )
    rgb, valid = np.ascontiguousarray(imagery.rgb, np.float32), imagery.valid
    # The last gate before the network: whatever the source believes, NaN and Inf stop here. A sum over
    # finite colours is finite, and four times cheaper to ask for.
    if not np.isfinite(rgb.sum()):
        valid = valid & np.isfinite(rgb).all(axis=0)
    wanted = valid & inside
    crops = _crops_with_work(window, plan.lattice, wanted)
    whole = bool(valid.all())
    filled = {} if whole else _filled(crops, plan.lattice, rgb, valid)
    packed = transfer.pack(rgb)
    return Pixels(rgb, packed, valid, wanted, imagery.date, crops, filled)


def _inside(window: WorkWindow, plan: Plan) -> np.ndarray:
    """True on the pixels of `plan.read_grid(window)` that lie in the output grid."""
    read = plan.read_grid(window)
    inside = np.zeros(read.shape, bool)
    rows, cols = (
        slice(
            max(0, -(span.served_from - plan.lattice.margin_px)),
            max(0, length - (span.served_from - plan.lattice.margin_px)),
        )
        for span, length in ((window.rows, plan.grid.height), (window.cols, plan.grid.width))
    )
    inside[rows, cols] = True
    return inside


def _crops_with_work(window: WorkWindow, lattice: Lattice, wanted: np.ndarray) -> tuple[Place, ...]:
    return tuple(
        (row, col)
        for row in range(len(window.rows.crops))
        for col in range(len(window.cols.crops))
        if wanted[served_slices((row, col), lattice)].any()
    )


def _filled(
    crops: tuple[Place, ...], lattice: Lattice, rgb: np.ndarray, valid: np.ndarray
) -> dict[Place, np.ndarray]:
    from canopy.models.fill import fill_invalid  # scipy: only where there are holes

    filled = {}
    for place in crops:
        rows, cols = crop_slices(place, lattice)
        if not valid[rows, cols].all():
            filled[place] = fill_invalid(rgb[:, rows, cols], valid[rows, cols])
    return filled


def crop_slices(place: Place, lattice: Lattice) -> tuple[slice, slice]:
    """Rows and columns of the window that the crop at `place` reads."""
    top, left = place[0] * lattice.stride_px, place[1] * lattice.stride_px
    return slice(top, top + lattice.crop_px), slice(left, left + lattice.crop_px)


def served_slices(place: Place, lattice: Lattice) -> tuple[slice, slice]:
    """Rows and columns of the window that the crop at `place` serves."""
    rows, cols = crop_slices(place, lattice)
    margin = lattice.margin_px
    return slice(rows.start + margin, rows.stop - margin), slice(cols.start + margin, cols.stop - margin)
