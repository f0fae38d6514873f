"""What a height map shows under GEDI shots whose place is only known to about ten metres.

The true footprint of a shot lies somewhere round its reported place. So the map is read at many displaced
discs per shot, drawn from the distribution of the position error; which of them the shot saw is left to the
fit (`canopy.calibration.monotone`). Reading the reported disc alone would flatten every regression: tall
places would be compared with their lower surroundings (attenuation by errors in the regressor).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import DataError
from canopy.geo.crs import METRES_PER_DEGREE, transformer
from canopy.geo.grid import Grid
from canopy.geo.raster import SourcePlace, open_raster

if TYPE_CHECKING:
    import pandas

    from canopy.calibration.intervals import FootprintGap


CANDIDATES = 32
_GOLDEN_RAD = np.pi * (3 - 5**0.5)


@dataclass(frozen=True)
class Footprints:
    """Shots beside the map, in rows.

    Attributes:
        height_m: (n,) relative height of the shot, e.g. RH98.
        map_m: (n, d) the map's same percentile over d displaced discs; the first is the reported place; NaN
            where the map is not seen there.
        xy_m: (n, 2) place in metres, in a plane local to the map.
        percent: which percentile of the disc, e.g. 98.
        gap: what discs of the canopy usually have over discs of this map; None takes them as equal.
    """

    height_m: np.ndarray
    map_m: np.ndarray
    xy_m: np.ndarray
    percent: int
    gap: FootprintGap | None = None

    def __len__(self) -> int:
        return len(self.height_m)

    @property
    def reported_m(self) -> np.ndarray:
        """(n,) the map at the reported place."""
        return self.map_m[:, 0]

    def expect(self, map_m: np.ndarray) -> np.ndarray:
        """What shots should see where a map that is right has these percentiles: the usual gap is added."""
        return map_m if self.gap is None else self.gap.expected(map_m)

    def take(self, chosen: np.ndarray) -> Footprints:
        """These rows only."""
        return replace(self, height_m=self.height_m[chosen], map_m=self.map_m[chosen], xy_m=self.xy_m[chosen])


def displacements(sigma_m: float, count: int = CANDIDATES) -> np.ndarray:
    """(count + 1, 2) east and north metres: no displacement, then a sunflower over a 2-D normal distribution.

    Equal shares of the distribution, turned by the golden angle: a fixed, evenly spread sample.
    """
    i = np.arange(count)
    radius = sigma_m * np.sqrt(-2 * np.log(1 - (i + 0.5) / count))
    spread = np.stack([radius * np.cos(i * _GOLDEN_RAD), radius * np.sin(i * _GOLDEN_RAD)], axis=1)
    return np.concatenate([np.zeros((1, 2)), spread])


def read_footprints(
    path: str | Path, shots: pandas.DataFrame, *, rh: int = 98, sigma_m: float = 10.0, least: int = 8,
    most: int = 10_000, seed: int = 0,
) -> Footprints:  # fmt: skip
    """Shots that lie on a map, with the map's percentile over their possible discs.

    Args:
        path: a height GeoTIFF in metres.
        shots: table of `canopy.labels.gedi.read_shots`.
        rh: the relative height that the map's percentile is compared with.
        sigma_m: standard deviation of the position error, metres per axis.
        least: fewest discs of a shot that must be wholly on the map.
        most: more shots than this are thinned at random: the fit gains nothing from them.

    Raises:
        DataError: no such relative height, or no shot on the map.
    """
    from canopy.labels.footprint import pool_over_disc
    from canopy.labels.shots import rh_column

    column = rh_column(rh)
    if column not in shots:
        have = ", ".join(str(c) for c in shots.columns if str(c).startswith("rh_"))
        raise DataError(f"no column {column}", where="shots", expected=f"one of: {have}", remedy="use --rh")
    grid = map_grid(path)
    near = _near(grid, shots, 4 * sigma_m)
    chosen = np.flatnonzero(near & np.isfinite(np.asarray(shots[column], np.float64)))
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, most, replace=False))
    lon, lat = (np.asarray(shots[c], np.float64)[chosen] for c in ("lon", "lat"))
    moves = displacements(sigma_m)
    values = pool_over_disc(Path(path), _displaced(lon, lat, moves), f"p{rh}").reshape(
        len(chosen), len(moves)
    )
    seen = np.isfinite(values).sum(axis=1) >= least
    if not seen.any():
        raise DataError(
            "no shot lies on the map", where=path, remedy="check that map and shots show the same place"
        )
    return Footprints(
        np.asarray(shots[column], np.float64)[chosen][seen], values[seen].astype(np.float64),
        local_xy(grid, lon, lat)[seen], rh,
    )  # fmt: skip


def map_grid(path: str | Path) -> Grid:
    """The grid of a raster file."""
    with open_raster(Path(path)) as dataset:
        return SourcePlace.of(dataset).grid()


def local_xy(grid: Grid, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """(n, 2) metres east and south of the map's upper-left corner, by its ground sample distance."""
    x, y = (np.asarray(v) for v in transformer("EPSG:4326", grid.crs).transform(lon, lat))
    west, _, _, north = grid.bounds
    px, py = grid.pixel
    return np.stack([(x - west) / px, (north - y) / py], axis=1) * grid.gsd_m


def _near(grid: Grid, shots: pandas.DataFrame, reach_m: float) -> np.ndarray:
    """True for shots whose reported place is on the map or within `reach_m` of it."""
    xy = local_xy(grid, np.asarray(shots["lon"], np.float64), np.asarray(shots["lat"], np.float64))
    height, width = (n * grid.gsd_m for n in grid.shape)
    inside = (xy > -reach_m).all(axis=1) & (xy[:, 0] < width + reach_m) & (xy[:, 1] < height + reach_m)
    return inside & np.isfinite(xy).all(axis=1)


def _displaced(lon: np.ndarray, lat: np.ndarray, moves: np.ndarray) -> pandas.DataFrame:
    """Table of n x d places: every shot at every displacement."""
    import pandas

    north = moves[None, :, 1] / METRES_PER_DEGREE
    east = moves[None, :, 0] / (METRES_PER_DEGREE * np.cos(np.deg2rad(lat))[:, None])
    return pandas.DataFrame({"lon": (lon[:, None] + east).ravel(), "lat": (lat[:, None] + north).ravel()})
