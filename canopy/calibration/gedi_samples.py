"""Samples for the GEDI model: image, facts and height of footprints, real or simulated from lidar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import DataError
from canopy.models.gedi import CROP_PX, FACTS, GSD_M

if TYPE_CHECKING:
    import pandas

    from canopy.chips.store import Chip
    from canopy.geo.grid import Grid
    from canopy.sources.imagery import ImagerySource

_RADIUS_M = 12.5
# Columns of a shots table, in the order of `FACTS`.
_COLUMNS = ("lat", "lon", "solar_elevation", "off_nadir", "slope")


@dataclass(frozen=True)
class Samples:
    """Footprints in rows.

    Attributes:
        rgb: uint8 (n, 3, 128, 128) at 0.5 m, the footprint in the middle.
        facts: float32 (n, 5), see `models.gedi.FACTS`; NaN where unknown.
        height_m: float32 (n,) relative height.
        region: (n,) names of regions, for holding whole ones out.
    """

    rgb: np.ndarray
    facts: np.ndarray
    height_m: np.ndarray
    region: np.ndarray

    def __len__(self) -> int:
        return len(self.height_m)

    def take(self, chosen: np.ndarray) -> Samples:
        """These rows only."""
        return Samples(self.rgb[chosen], self.facts[chosen], self.height_m[chosen], self.region[chosen])


def simulated(
    chips: Sequence[Chip], *, per_chip: int = 40, rh: int = 98, seed: int = 0,
    places: Mapping[str, tuple[float, float]] | None = None,
) -> Samples:  # fmt: skip
    """Footprints simulated on lidar heights: RH is the percentile of the 1 m cells in the 25 m disc.

    Args:
        chips: pairs of image (0.5 m) and heights (1 m).
        per_chip: most footprints of a chip, at random places whose disc is at least 90 % known.
        places: longitude and latitude by chip id, where known.

    Raises:
        DataError: no chip has room for a footprint.
    """
    rng = np.random.default_rng(seed)
    half = CROP_PX // 2
    steps = np.arange(-13, 13) + 0.5
    disc = steps[:, None] ** 2 + steps[None, :] ** 2 <= _RADIUS_M**2
    crops, facts, heights, regions = [], [], [], []
    for chip in chips:
        h, w = chip.chm_m.shape
        if min(h, w) < CROP_PX // 2:
            continue
        lon, lat = (places or {}).get(chip.row.id, (np.nan, np.nan))
        for _ in range(per_chip):
            row, col = (int(rng.integers(half // 2, n - half // 2 + 1)) for n in (h, w))
            cells = chip.chm_m[row - 13 : row + 13, col - 13 : col + 13][disc]
            if np.isfinite(cells).mean() < 0.9:
                continue
            rgb = chip.rgb[:, 2 * row - half : 2 * row + half, 2 * col - half : 2 * col + half]
            if (rgb.max(axis=0) > 0).mean() < 0.9:
                continue
            crops.append(rgb)
            facts.append([lat, lon, np.nan, np.nan, np.nan])
            heights.append(np.nanpercentile(cells, rh))
            regions.append(chip.row.site)
    if not crops:
        raise DataError("no chip has room for a footprint", expected="chips of 64 m or more")
    return Samples(
        np.stack(crops), np.array(facts, np.float32), np.array(heights, np.float32), np.array(regions)
    )


def joined(
    source: ImagerySource, shots: pandas.DataFrame, *, rh: int = 98, region: str = "", gsd_m: float = GSD_M
) -> Samples:
    """Real shots with the imagery round them; shots without enough imagery are left out.

    Args:
        source: imagery, see `open_imagery`.
        shots: table of `read_shots`; `solar_elevation`, `off_nadir`, `slope` (degrees) are used where there.

    Raises:
        DataError: no such relative height, or no shot has imagery.
    """
    from canopy.sources.gedi_table import rh_column

    column = rh_column(rh)
    if column not in shots:
        raise DataError(f"no column {column}", where="shots")
    lon, lat = (np.asarray(shots[name], np.float64) for name in ("lon", "lat"))
    heights = np.asarray(shots[column], np.float64)
    rgb, kept = crops_at(source, lon, lat, gsd_m)
    kept &= np.isfinite(heights)
    if not kept.any():
        raise DataError("no shot has imagery round it", where=source.name)
    facts = np.full((len(lon), len(FACTS)), np.nan, np.float32)
    for number, name in enumerate(_COLUMNS):
        if name in shots:
            facts[:, number] = np.asarray(shots[name], np.float32)
    return Samples(rgb[kept], facts[kept], heights[kept].astype(np.float32), np.full(kept.sum(), region))


def crops_at(
    source: ImagerySource, lon: np.ndarray, lat: np.ndarray, gsd_m: float = GSD_M
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 3, 128, 128) round places, and whether at least 90 % of each is there (n,)."""
    from canopy.geo.crs import transformer, utm_crs
    from canopy.models.fill import fill_invalid

    crops = np.zeros((len(lon), 3, CROP_PX, CROP_PX), np.uint8)
    kept = np.zeros(len(lon), bool)
    for i in range(len(lon)):
        crs = utm_crs(float(lon[i]), float(lat[i]))
        x, y = transformer("EPSG:4326", crs).transform(lon[i], lat[i])
        imagery = source.read(_around(crs, float(x), float(y), gsd_m))
        if imagery.valid.mean() >= 0.9:
            crops[i] = np.round(fill_invalid(imagery.rgb, imagery.valid) * 255)
            kept[i] = True
    return crops, kept


def _around(crs: object, x: float, y: float, gsd_m: float) -> Grid:
    from affine import Affine

    from canopy.geo.grid import Grid

    half = CROP_PX / 2 * gsd_m
    west, north = round((x - half) / gsd_m) * gsd_m, round((y + half) / gsd_m) * gsd_m
    return Grid.of(crs, Affine(gsd_m, 0, west, 0, -gsd_m, north), (CROP_PX, CROP_PX))
