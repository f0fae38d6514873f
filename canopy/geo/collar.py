"""The collar of lossy images: a border without image whose pixels are not quite nodata any more.

JPEG and its kin decode a black or white collar as such, but for the blocks that it shares with the image:
there its pixels ring by some counts, up to 17 px away from the edge. They equal no nodata value, and to a
network they are dark forest or bright ground.

What is collar is settled once per file, from its cells of 8 px: those that are nodata to 2 counts and
connected to the frame through others are the core. A pixel near nodata belongs to the collar where it is
connected to the core through such pixels, in 18 steps at most. So shadows inside the image keep their pixels,
dark ones at the frame too, and a window that is read with 18 px around it shows the collar of the whole file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import MaskFlags, Resampling
from rasterio.io import DatasetReader
from rasterio.windows import Window

_CELL_PX = 8
_MOST_CELLS = 4096  # along one side: of larger files cells are larger
_PROBE_PX = 8
_SOURCES = 3  # of a VRT that are asked how they were compressed
# Counts of 255. The core is exact but for rounding; of a collar 94 % (quality 50) to 99 % (90) are within 16,
# and hardly any pixel of a forest is.
_EXACT, _NEAR = 2, 16


@dataclass(frozen=True, eq=False)
class Collar:
    """The collar of one file.

    Attributes:
        value: what its pixels would be without compression, in every band.
        near: distance from `value` that is still near it.
        core: bool (rows, columns) of cells that share out the file's shape evenly.
        shape: rows and columns of the file.
    """

    value: int
    near: int
    core: NDArray[np.bool_]
    shape: tuple[int, int]

    reach_px = 18

    def mask(self, values: np.ndarray, row: int, col: int) -> NDArray[np.bool_]:
        """True (h, w) in the collar; exact `reach_px` away from edges of the window that are not the file's.

        Args:
            values: (bands, h, w) as stored, of the window whose first pixel is (row, col).
            row, col: of the file.
        """
        from scipy import ndimage

        rows, cols = (
            (first + np.arange(size)) * cells // extent
            for first, size, cells, extent in zip(
                (row, col), values.shape[1:], self.core.shape, self.shape, strict=True
            )
        )
        core = self.core[np.ix_(rows, cols)]
        if not core.any():
            return core
        near = is_near(values, self.value, self.near)
        return ndimage.binary_dilation(core & near, np.ones((3, 3), bool), self.reach_px, mask=near)


def is_near(values: np.ndarray, value: int, most: int) -> NDArray[np.bool_]:
    """Where all bands of (bands, h, w) differ from a value by no more than so much."""
    near: NDArray[np.bool_] = np.logical_and(values >= value - most, values <= value + most)
    return np.logical_and.reduce(near)


def frame_windows(dataset: DatasetReader) -> Iterator[Window]:
    """Eight small windows at the frame: the corners, and the middles of the edges."""
    px = min(_PROBE_PX, dataset.height, dataset.width)
    rows, cols = ([0, (extent - px) // 2, extent - px] for extent in dataset.shape)
    for row, col in sorted(set(itertools.product(rows, cols)) - {(rows[1], cols[1])}):
        yield Window(col, row, px, px)


def _is_lossy(dataset: DatasetReader) -> bool:
    """Whether a file, or one of the first sources of a VRT, was compressed with loss."""
    if dataset.driver == "VRT":
        for name in dataset.files[1 : 1 + _SOURCES]:
            with rasterio.open(name) as source:
                if _is_lossy(source):
                    return True
        return False
    tags = dataset.tags(ns="IMAGE_STRUCTURE")
    return tags.get("COMPRESSION_REVERSIBILITY") == "LOSSY" or tags.get("COMPRESSION", "").endswith("JPEG")


def find_collar(
    dataset: DatasetReader, indexes: Sequence[int], white: float, nodata: float | None
) -> Collar | None:
    """The collar of a file of whole numbers that was compressed with loss and has no mask; None without.

    Only where one of its `frame_windows` shows it is the whole file looked at, by overviews if it has any.

    Args:
        dataset: open for reading.
        indexes: the bands that are read, from 1.
        white: value of a white collar.
        nodata: the collar's value; default: the file's, and where it has none, black or white.

    Raises:
        RasterioError: pixels cannot be read.
    """
    from scipy import ndimage

    kind = np.dtype(dataset.dtypes[indexes[0] - 1]).kind
    flags = dataset.mask_flag_enums[indexes[0] - 1][0]
    if kind != "u" or flags not in (MaskFlags.all_valid, MaskFlags.nodata) or not _is_lossy(dataset):
        return None
    declared = dataset.nodatavals[indexes[0] - 1] if nodata is None else nodata
    exact, near = (max(1, round(white * counts / 255)) for counts in (_EXACT, _NEAR))
    probes = [dataset.read(list(indexes), window=window) for window in frame_windows(dataset)]
    for value in (0, round(white)) if declared is None else (round(declared),):
        if any(is_near(pixels, value, exact).all() for pixels in probes):
            break
    else:
        return None
    cell = max(_CELL_PX, -(-max(dataset.shape) // _MOST_CELLS))
    means = dataset.read(
        list(indexes),
        out_shape=(len(indexes), *(-(-extent // cell) for extent in dataset.shape)),
        resampling=Resampling.average,
    )
    core = is_near(means, value, exact)
    frame = core.copy()
    frame[1:-1, 1:-1] = False
    return Collar(value, near, ndimage.binary_propagation(frame, mask=core), dataset.shape)
