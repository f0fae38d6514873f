"""A checksum per 512 px block that pixels may enter in any order and in windows of any size.

Each pixel adds (stored bits - nodata bits) x (an odd 64-bit number of its place in the block), modulo
2^64. Sums do not care about order, a pixel never written adds nothing, and as odd numbers have an
inverse any single changed pixel changes the sum. It guards against damage, not against malice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from canopy.errors import OutputError

BLOCK = 512


def _place_factors() -> np.ndarray:
    """Odd uint64 numbers (512, 512) from the splitmix64 sequence."""
    z = np.arange(1, BLOCK * BLOCK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).reshape(BLOCK, BLOCK)


class BlockChecksums:
    """Sums per (band, block row, block column), and which pixels have been added.

    Memory: eight bytes per block and band, and one bit per pixel of blocks begun but not finished.
    """

    def __init__(self, bands: int, height: int, width: int, dtype: str, nodata: float) -> None:
        self.height, self.width = height, width
        self.sums = np.zeros((bands, -(-height // BLOCK), -(-width // BLOCK)), dtype=np.uint64)
        self._bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
        self._empty = np.array(nodata, dtype=dtype).view(self._bits).astype(np.uint64)
        self._factors = _place_factors()
        self._begun: dict[tuple[int, int], np.ndarray] = {}
        self._full = np.zeros(self.sums.shape[1:], dtype=bool)

    def blocks(self, row: int, col: int, height: int, width: int) -> Iterator[tuple[int, int, tuple, tuple]]:
        """(block row, block col, slices within the block, slices within the window)."""
        for i in range(row // BLOCK, -(-(row + height) // BLOCK)):
            top, bottom = max(row, i * BLOCK), min(row + height, (i + 1) * BLOCK)
            for j in range(col // BLOCK, -(-(col + width) // BLOCK)):
                left, right = max(col, j * BLOCK), min(col + width, (j + 1) * BLOCK)
                inner = np.s_[top - i * BLOCK : bottom - i * BLOCK, left - j * BLOCK : right - j * BLOCK]
                outer = np.s_[top - row : bottom - row, left - col : right - col]
                yield i, j, inner, outer

    def add(self, stored: np.ndarray, row: int, col: int) -> None:
        """Add a window of stored numbers (b, h, w). Raises OutputError when a pixel comes twice."""
        for i, j, inner, outer in self.blocks(row, col, *stored.shape[1:]):
            self._claim(i, j, inner)
            self.sums[:, i, j] += self.sums_of(stored[:, *outer], inner)

    def sums_of(self, stored: np.ndarray, inner: tuple) -> np.ndarray:
        """uint64 (b,): the sums of one window inside one block."""
        bits = np.ascontiguousarray(stored).view(self._bits).astype(np.uint64) - self._empty
        return (bits * self._factors[inner]).sum(axis=(1, 2), dtype=np.uint64)

    def _claim(self, i: int, j: int, inner: tuple) -> None:
        shape = min(BLOCK, self.height - i * BLOCK), min(BLOCK, self.width - j * BLOCK)
        taken = self._begun.setdefault((i, j), np.zeros(shape, dtype=bool))
        if self._full[i, j] or taken[inner].any():
            self._begun.pop((i, j), None)
            raise OutputError(
                f"pixels of block ({i}, {j}) were written twice", expected="windows that do not overlap"
            )
        taken[inner] = True
        if taken.all():
            self._full[i, j] = True
            del self._begun[i, j]
