"""Train, validation and test split by place: whole sites held out, blocks of ground, a buffer between.

Neighbouring chips share trees, light and camera, so a random split flatters a model. Here a chip's split
follows from where its centre lies, and what is trained on near a test chip is dropped, with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from canopy.chips.store import BUFFER_M
from canopy.errors import DataError

TEST, TRAIN, VAL = "test", "train", "val"
TOO_CLOSE = "too close to a test chip"


@dataclass(frozen=True)
class Place:
    """A chip's ground: bounds (west, south, east, north) in `crs`, site, and split ('' = not given)."""

    site: str
    crs: Any
    bounds: tuple[float, float, float, float]
    split: str = ""

    @property
    def is_test(self) -> bool:
        """Any split whose name begins with 'test' is for final scores."""
        return self.split.startswith(TEST)


@dataclass(frozen=True)
class SplitRules:
    """How to split what has no split yet.

    Attributes:
        block_m: side of the square blocks that go to one split as a whole.
        val, test: share of the blocks.
        held_out: site names or patterns (`*`) that are test as a whole.
        buffer_m: train chips closer than this to a test chip are dropped.
        seed: other seeds, other blocks.
    """

    block_m: float = 1000.0
    val: float = 0.1
    test: float = 0.1
    held_out: tuple[str, ...] = ()
    buffer_m: float = BUFFER_M
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.block_m > 0 and self.buffer_m >= 0 and self.val >= 0 and self.test >= 0):
            raise DataError("negative split settings", expected="block > 0; shares and buffer >= 0")
        if self.val + self.test >= 1:
            raise DataError(f"val {self.val} and test {self.test} leave nothing to train on")


def assign(places: Sequence[Place], rules: SplitRules) -> list[Place]:
    """Fill in missing splits. Given ones are kept, also against `held_out`: they must not contradict it.

    The same ground gets the same split whatever site, file or date it came from: blocks are counted from
    the equator and Greenwich, and which split a block falls to follows from its numbers and the seed.

    Raises:
        DataError: a held-out site has chips that were given as train or val, or matches no site.
    """
    sites = {p.site for p in places}
    for pattern in rules.held_out:
        if not any(fnmatchcase(site, pattern) for site in sites):
            raise DataError(
                f"no site is called {pattern!r}", expected=f"one of {', '.join(sorted(sites))[:300]}"
            )
    out = []
    for place, (lon, lat) in zip(places, _centres(places), strict=True):
        held_out = any(fnmatchcase(place.site, pattern) for pattern in rules.held_out)
        if held_out and place.split and not place.is_test:
            raise DataError(f"site {place.site!r} is held out, but has chips given as {place.split}")
        split = place.split or (TEST if held_out else _split_of_block(lon, lat, rules))
        out.append(replace(place, split=split))
    return out


def _split_of_block(lon: float, lat: float, rules: SplitRules) -> str:
    from canopy.geo.crs import METRES_PER_DEGREE

    row = int(np.floor(lat * METRES_PER_DEGREE / rules.block_m))
    # One scale per row of blocks, so that blocks stay square and their edges meet.
    scale = METRES_PER_DEGREE * np.cos(np.radians(row * rules.block_m / METRES_PER_DEGREE))
    col = int(np.floor(lon * max(scale, 1.0) / rules.block_m))
    digest = hashlib.sha256(f"{rules.seed}/{rules.block_m:g}/{row}/{col}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return TEST if draw < rules.test else VAL if draw < rules.test + rules.val else TRAIN


def drop_near_test(places: Sequence[Place], buffer_m: float) -> list[str]:
    """For each chip '' or `TOO_CLOSE`: train chips within `buffer_m` of any test chip must go."""
    distance = distance_to_test(places, buffer_m)
    return [
        TOO_CLOSE if p.split == TRAIN and d <= buffer_m else "" for p, d in zip(places, distance, strict=True)
    ]


def distance_to_test(places: Sequence[Place], reach_m: float) -> np.ndarray:
    """Metres (n,) from each chip's edge to the nearest test chip's; infinity beyond `reach_m` and for
    test chips themselves. Overlap is 0. Measured in UTM, whatever CRSs the chips are in."""
    from shapely import STRtree

    from canopy.geo.crs import METRES_PER_DEGREE, to_crs, utm_crs, utm_zone

    out = np.full(len(places), np.inf)
    tests = [i for i, p in enumerate(places) if p.is_test]
    others = [i for i, p in enumerate(places) if not p.is_test]
    if not tests or not others:
        return out
    points = np.array(_centres(places))
    zones: dict[str, list[int]] = {}
    for i in others:
        own = to_crs(places[i].crs)
        crs = own if utm_zone(own) is not None else utm_crs(*points[i])
        zones.setdefault(str(crs), []).append(i)
    for zone, members in zones.items():
        # Test chips on the other side of the Earth would not survive the projection.
        lat = max(np.abs(points[members, 1]).max(), np.abs(points[tests, 1]).max())
        near_deg = 1.0 + 2 * reach_m / METRES_PER_DEGREE / max(np.cos(np.radians(lat)), 0.01)
        low, high = points[members].min(axis=0) - near_deg, points[members].max(axis=0) + near_deg
        lon = (points[tests, 0] - low[0]) % 360  # across the date line too
        beside = (lon <= high[0] - low[0]) & (points[tests, 1] >= low[1]) & (points[tests, 1] <= high[1])
        found = [_outline(places[tests[k]], zone) for k in np.flatnonzero(beside)]
        if found:
            shapes = [_outline(places[i], zone) for i in members]
            (at, _), distance = STRtree(found).query_nearest(
                shapes, max_distance=reach_m + 1.0, return_distance=True, all_matches=False
            )
            out[np.array(members)[at]] = distance
    return np.where(out <= reach_m, out, np.inf)


def _outline(place: Place, crs: Any) -> Any:
    """A chip's ground as a polygon in another CRS."""
    from shapely.geometry import box

    from canopy.geo.crs import project

    return project(box(*place.bounds), place.crs, crs)


def _centres(places: Sequence[Place]) -> list[tuple[float, float]]:
    """Longitude and latitude of every chip's centre; one transformation per CRS."""
    from canopy.geo.crs import transformer

    out: list[tuple[float, float]] = [(0.0, 0.0)] * len(places)
    by_crs: dict[str, list[int]] = {}
    for i, place in enumerate(places):
        by_crs.setdefault(str(place.crs), []).append(i)
    for members in by_crs.values():
        bounds = np.array([places[i].bounds for i in members])
        x, y = (bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2
        lon, lat = transformer(places[members[0]].crs, "EPSG:4326").transform(x, y)
        for i, point in zip(members, zip(lon, lat, strict=True), strict=True):
            if not np.isfinite(point).all():
                raise DataError("a chip lies outside its CRS's domain", where=places[i].site)
            out[i] = float(point[0]), float(point[1])
    return out
