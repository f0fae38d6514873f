"""One side of a judgement: a height map, or the height model that it is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.targets import sensor_floor
from canopy.errors import InputError
from canopy.evaluation.products import HeightProduct, open_product
from canopy.evaluation.resample import read_mean_bounds, read_stat
from canopy.files import file_sha256
from canopy.geo.grid import Grid
from canopy.geo.paths import is_url
from canopy.sources.dates import acquisition_date

# Heights beyond these are no trees: an undeclared nodata value, a bird, a pylon.
LOWEST_M, HIGHEST_M = -50.0, 150.0
REFERENCE_LOWEST_M, REFERENCE_HIGHEST_M = -3.0, 120.0
FLOOR_TAGS = ("CANOPY_SENSOR", "LIDAR_SENSOR", "SENSOR")
# Hashing a file must not take longer than scoring it.
_HASH_BYTES = 2**30


class HeightSide:
    """An open product, read as the judge reads it.

    A reference's heights are clamped at 0 and must lie in -3..120 m; a map's are taken as they are, within
    -50..150 m. What lies beyond is left out and counted in `strange`.
    """

    def __init__(self, product: HeightProduct, *, reference: bool) -> None:
        self.product, self.reference, self.strange = product, reference, 0

    @classmethod
    def open(cls, path: Any, *, reference: bool = False, nodata: float | None = None) -> HeightSide:
        """Open a file, a folder or list of tiles, or a published map; see `open_product` for the errors."""
        return cls(open_product(path, nodata=nodata), reference=reference)

    def read(self, grid: Grid, stat: str) -> tuple[np.ndarray, np.ndarray]:
        """Heights on a grid: float64 (h, w) metres, 0 where not valid; valid (h, w). See `read_stat`."""
        heights, valid = read_stat(self.product, grid, stat)
        low, high = (REFERENCE_LOWEST_M, REFERENCE_HIGHEST_M) if self.reference else (LOWEST_M, HIGHEST_M)
        sane = (heights >= low) & (heights <= high)
        self.strange += int(np.count_nonzero(valid & ~sane))
        valid = valid & sane
        return np.where(valid, np.maximum(heights, 0) if self.reference else heights, 0), valid

    def read_bounds(self, grid: Grid) -> tuple[np.ndarray, np.ndarray] | None:
        """Lower and upper end of the map's interval (h, w), NaN where unknown; None without such bands."""
        return read_mean_bounds(self.product, grid)

    @property
    def dates(self) -> tuple[str, ...]:
        """First and last date it shows, ISO (years where only these are known); empty where unknown."""
        if self.product.dates:
            return self.product.dates
        days = {acquisition_date(tile.tags, tile.path) for tile in self.product.tiles[:1000]}
        known = sorted(day.isoformat() for day in days if day)
        return tuple(dict.fromkeys((known[0], known[-1]))) if known else ()

    @property
    def floor_m(self) -> float:
        """Height below which this reference knows nothing, from its tags; 0 where nothing is said."""
        for name in FLOOR_TAGS:
            if self.product.tags.get(name):
                try:
                    return sensor_floor(self.product.tags[name])
                except InputError:
                    continue  # some other sensor: only NEON's height models have floors
        return 0.0

    def facts(self) -> dict[str, Any]:
        """Plain data for the provenance; no folders."""
        product = self.product
        return {
            "name": product.name,
            "kind": product.kind,
            "files": len(product.tiles),
            "sha256": known_sha256(product.tiles[0].path) if len(product.tiles) == 1 else None,
            "crs": str(product.crs),
            "gsd_m": round(product.gsd_m, 4),
            "dates": list(self.dates),
            "tags": {k: v for k, v in sorted(product.tags.items()) if k.startswith("CANOPY_")},
        }

    def close(self) -> None:
        """Close its files."""
        self.product.close()

    def __enter__(self) -> HeightSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def known_sha256(path: str | Path) -> str | None:
    """Of a local file up to 1 GiB; None for others."""
    if is_url(path) or not Path(path).is_file() or Path(path).stat().st_size > _HASH_BYTES:
        return None
    return file_sha256(path)
