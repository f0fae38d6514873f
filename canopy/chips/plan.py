"""Train, validation and test split by place: whole sites held out, blocks of ground, a buffer between.

Neighbouring chips share trees, light and camera, so a random split flatters a model. Here a chip's split
follows from where its centre lies, and what is trained on near a test chip is dropped, with the reason.

From a manifest of image and height pairs to the chips to cut: windows, splits, ids and shards.

Only headers are read here, and every file once for its hash; pixels come later (`canopy.chips.cutting`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.targets import RULES, sensor_floor
from canopy.errors import DataError, InputError
from canopy.files import check_name, file_sha256
from canopy.geo.crs import utm_crs
from canopy.geo.grid import Grid
from canopy.imagery.base import ImagerySource
from canopy.imagery.open import open_imagery

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
    buffer_m: float = 50.0
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


def count_near_test(places: Sequence[Place], buffer_m: float) -> int:
    """How many train chips lie within `buffer_m` of a test chip; 0 after `drop_near_test`."""
    return sum(bool(reason) for reason in drop_near_test(places, buffer_m))


def distance_to_test(places: Sequence[Place], reach_m: float) -> np.ndarray:
    """Metres (n,) from each chip's edge to the nearest test chip's; infinity beyond `reach_m` and for
    test chips themselves. Overlap is 0. Exact whatever CRSs the chips are in."""
    from scipy.spatial import cKDTree

    out = np.full(len(places), np.inf)
    tests = [i for i, p in enumerate(places) if p.is_test]
    others = [i for i, p in enumerate(places) if not p.is_test]
    if not tests or not others:
        return out
    points, radius = _on_sphere(places)
    tree = cKDTree(points[tests])
    # Chords are a little shorter than arcs and the sphere is not the ellipsoid: 1 % and 1 m in hand.
    reach = 1.01 * (reach_m + radius[others] + radius[tests].max()) + 1.0
    for i, near in zip(others, tree.query_ball_point(points[others], reach), strict=True):
        for k in near:
            out[i] = min(out[i], _gap_m(places[i], places[tests[k]]))
    return np.where(out <= reach_m, out, np.inf)


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


def _on_sphere(places: Sequence[Place]) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, 3) in metres from the Earth's centre, and half diagonals (n,) in metres."""
    from canopy.geo.crs import METRES_PER_DEGREE, metres_per_unit, to_crs

    lon, lat = np.radians(np.array(_centres(places))).T
    points = 6_371_000 * np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    radius = []
    for place in places:
        unit = METRES_PER_DEGREE if to_crs(place.crs).geographic else metres_per_unit(place.crs)
        w, s, e, n = place.bounds
        radius.append(unit * np.hypot(e - w, n - s) / 2)
    return points, np.array(radius)


def _gap_m(a: Place, b: Place) -> float:
    """Shortest distance of two rectangles of ground, metres, in the UTM zone of the first."""
    from shapely.geometry import box

    from canopy.geo.crs import project, to_crs, utm_crs

    zone = to_crs(a.crs)
    if zone != to_crs(b.crs) or not _is_utm(zone):
        zone = utm_crs(*_centres([a])[0])
    shapes = [project(box(*p.bounds), p.crs, zone) for p in (a, b)]
    return float(shapes[0].distance(shapes[1]))


def _is_utm(crs: Any) -> bool:
    from canopy.geo.crs import utm_zone

    return utm_zone(crs) is not None


FORMAT = 1  # raise it when the same inputs would give other bytes
LABEL_FACTOR = 2  # image pixels to a label pixel, as the chips store and the models have it
_BLOCK_CHIPS = 4  # chips to a side that are read, and registered, together
_CHIPS_PER_SHARD = 64
_NEON_FLOOR_M = 2.0  # where a NEON label's sensor is not told: the higher of the two


@dataclass(frozen=True)
class CutRules:
    """How chips are cut; equal rules and files give equal bytes.

    Attributes:
        size_px: side of a chip's image; the last of a row may be half or one and a half times as long.
        gsd_m: ground metres per image pixel.
        rule: how several label pixels become one, see `targets.chm_target`.
        register: measure the shift between image and label, and undo it up to `most_shift_m`; beyond,
            the chips are rejected.
        most_shift_m: crowns lean that far in ordinary aerial images of mountains.
        rh: relative height of GEDI shots.
    """

    size_px: int = 256
    gsd_m: float = 0.5
    rule: str = "mean"
    register: bool = True
    most_shift_m: float = 10.0
    rh: int = 98

    def __post_init__(self) -> None:
        if self.size_px < 32 or self.size_px % 2:
            raise InputError(f"chips of {self.size_px} px", expected="an even number, at least 32")
        if not 0.05 <= self.gsd_m <= 10:
            raise InputError(f"ground sample distance of {self.gsd_m} m", expected="0.05 to 10")
        if self.rule not in RULES:
            raise InputError(f"label rule {self.rule!r}", expected=" or ".join(RULES))
        if not 0 < self.most_shift_m <= 12:
            raise InputError(f"largest shift of {self.most_shift_m} m", expected="above 0, at most 12")
        if not 0 <= self.rh <= 100:
            raise InputError(f"relative height {self.rh}", expected="0 to 100")


@dataclass(frozen=True)
class Pair:
    """One row of the manifest, with the hash of all its files. `chm` is '' for an image without heights."""

    id: str
    site: str
    kind: str
    split: str
    rgb: str
    chm: str
    gedi: str
    crs: str
    gap_years: float | None
    floor_m: float
    licence: str
    sha256: str = ""


@dataclass(frozen=True)
class PlannedChip:
    """A window (row, col, height, width) of a pair's image grid, with its split and, if so, why not."""

    id: str
    window: tuple[int, int, int, int]
    place: Place
    reason: str = ""
    test_distance_m: float = float("nan")


@dataclass(frozen=True)
class Block:
    """Neighbouring chips of one pair that are read and registered together."""

    pair: Pair
    grid: Grid
    chips: tuple[PlannedChip, ...]


@dataclass(frozen=True)
class Shard:
    """What is cut into one file. `key` names it and stands for everything that decides its bytes."""

    split: str
    key: str
    blocks: tuple[Block, ...]
    rules: CutRules = field(default_factory=CutRules)

    @property
    def name(self) -> str:
        """File name without suffix."""
        return f"{self.split}-{self.key}"


def read_pairs(manifest: str | Path, limit: int | None = None) -> list[Pair]:
    """Pairs of a CSV or Parquet manifest; paths in it are relative to it.

    Columns: rgb_path, chm_path; optional id (else the image's file name), site, kind, split, crs (for images
    that carry none), date_rgb or year_rgb, date_chm or year_chm, sensor or floor_m, gedi_path, licence.
    Others are ignored. A row may leave chm_path empty: an image without heights, for pretraining.

    Raises:
        DataError: a missing file or column, an id used twice or unfit for a name, or bad values.
    """
    path = Path(manifest)
    rows = list(_rows(path))[:limit]
    if not rows:
        raise DataError("has no rows", where=path)
    missing = [c for c in ("rgb_path", "chm_path") if c not in rows[0]]
    if missing:
        raise DataError(
            f"lacks the columns {', '.join(missing)}",
            where=path,
            expected="rgb_path, chm_path; if known id, site, split, date_rgb, date_chm (docs/training.md)",
        )
    pairs: dict[str, Pair] = {}
    for row in rows:
        pair = _pair({**row, "id": row.get("id") or Path(row["rgb_path"]).stem}, path)
        if pair.id in pairs:
            raise DataError(f"id {pair.id!r} occurs twice", where=path)
        pairs[pair.id] = pair
    return list(pairs.values())


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise DataError("no such manifest", where=path)
    if path.suffix == ".parquet":
        import pandas

        try:
            table = pandas.read_parquet(path)
        except (ValueError, OSError) as error:
            raise DataError("is not a Parquet table", where=path) from error
        for record in table.to_dict("records"):
            yield {str(k): "" if v is None or v != v else str(v) for k, v in record.items()}
        return
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                yield {k: v or "" for k, v in row.items() if k is not None}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"is not a CSV table ({error})", where=path) from error


def _pair(row: Mapping[str, str], manifest: Path) -> Pair:
    where = f"{manifest}, id {row['id']!r}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", row["id"]):
        raise DataError(
            "unfit as a file name", where=where, expected="letters, digits, dot, dash, underscore"
        )
    split = row.get("split", "")
    if split and not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", split):
        raise DataError(f"split {split!r}", where=where, expected="train, val, test or test_...")
    files = [_file(row, column, manifest, where) for column in ("rgb_path", "chm_path", "gedi_path")]
    if not files[0]:
        raise DataError("no rgb_path", where=where)
    kind = row.get("kind", "")
    kind = kind if kind in ("neon", "synth") else "lidar"
    image, label = (_year(row.get(f"date_{k}") or row.get(f"year_{k}", "")) for k in ("rgb", "chm"))
    gap = abs(image - label) if image is not None and label is not None else None
    floor = sensor_floor(row.get("sensor")) or (_NEON_FLOOR_M if kind == "neon" else 0.0)
    try:
        floor = float(row["floor_m"]) if row.get("floor_m") else floor
    except ValueError as error:
        raise DataError(f"floor_m {row['floor_m']!r}", where=where, expected="metres") from error
    hashes = "/".join(file_sha256(Path(f)) if f else "" for f in files)
    return Pair(
        id=row["id"], site=row.get("site") or "unknown", kind=kind, split=split,
        rgb=files[0], chm=files[1], gedi=files[2], crs=row.get("crs", ""), gap_years=gap, floor_m=floor,
        licence=row.get("licence", ""), sha256=hashlib.sha256(hashes.encode()).hexdigest(),
    )  # fmt: skip


def _file(row: Mapping[str, str], column: str, manifest: Path, where: str) -> str:
    name = row.get(column, "")
    if not name:
        return ""
    path = manifest.parent / check_name(name, DataError)
    if not path.is_file():
        raise DataError(
            f"{column} {name!r} does not exist", where=where, remedy="paths count from the manifest"
        )
    return str(path)


def _year(text: str) -> float | None:
    """2021 or 2021-06-30 as a year with fraction; None for anything that is no single date."""
    found = re.fullmatch(r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ]\d.*)?)?)?", text.strip())
    if not found:
        return None
    year, month, day = (int(g) if g else None for g in found.groups())
    assert year is not None  # the pattern has it
    if month is None:
        return year + 0.5
    return year + (month - 1) / 12 + ((day or 15) - 1) / 365


# ---- grids and windows ----------------------------------------------------------------------------
def image_grid(source: ImagerySource, gsd_m: float) -> Grid:
    """The grid of a pair's chips: from the image's own corner, in its own CRS where that is projected.

    Whole multiples of the image's pixels are kept whole, so that nothing is resampled without need.
    """
    native = source.native_grid
    if native is None or not native.crs.projected:
        area = source.area()
        if area is None:
            raise DataError("an image without an outline", where=source.name)
        crs = utm_crs(*area.centroid_lonlat)
        grid = Grid.from_bounds(area.to_crs(crs).geometry.bounds, crs, gsd_m)
    else:
        ratio = gsd_m / native.gsd_m
        n = max(1, round(ratio))
        ratio = n if abs(ratio / n - 1) < 0.02 else ratio
        (px, py), (x, y) = native.pixel, native.xy(0, 0)
        shape = int(native.height / ratio + 1e-6), int(native.width / ratio + 1e-6)
        grid = Grid.of(native.crs, (px * ratio, 0, x, 0, -py * ratio, y), shape)
    h, w = (n // LABEL_FACTOR * LABEL_FACTOR for n in grid.shape)
    if min(h, w) < 2 * LABEL_FACTOR:
        raise DataError(f"an image of {grid.width} x {grid.height} px at {gsd_m:g} m", where=source.name)
    return grid.window(0, 0, h, w)


def edges(length: int, size: int) -> list[int]:
    """Where chips of about `size` begin and end along `length`: none overlap, nothing is left over."""
    count = max(1, round(length / size))
    return [i * size for i in range(count)] + [length]


def _blocks(pair: Pair, rules: CutRules) -> Iterator[Block]:
    source = open_imagery(pair.rgb, crs=pair.crs or None)
    if source.native_gsd_m > 1.51 * rules.gsd_m:  # 0.75 m on a map is a little more on the ground
        raise DataError(
            f"an image of {source.native_gsd_m:.2g} m for chips of {rules.gsd_m:g} m", where=pair.rgb
        )
    grid = image_grid(source, rules.gsd_m)
    rows, cols = (edges(n, rules.size_px) for n in grid.shape)
    for i in range(0, len(rows) - 1, _BLOCK_CHIPS):
        for j in range(0, len(cols) - 1, _BLOCK_CHIPS):
            cells = [
                (rows[a], cols[b], rows[a + 1] - rows[a], cols[b + 1] - cols[b])
                for a in range(i, min(i + _BLOCK_CHIPS, len(rows) - 1))
                for b in range(j, min(j + _BLOCK_CHIPS, len(cols) - 1))
            ]
            yield Block(pair, grid, tuple(_chip(pair, grid, cell, rules) for cell in cells))


def _chip(pair: Pair, grid: Grid, cell: tuple[int, int, int, int], rules: CutRules) -> PlannedChip:
    facts = [FORMAT, asdict(rules), pair.sha256, pair.crs, pair.gap_years, pair.floor_m, cell]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    crs = f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else grid.crs.to_wkt()
    place = Place(pair.site, crs, grid.window(*cell).bounds, pair.split)
    return PlannedChip(f"{pair.id}-{cell[0]}-{cell[1]}-{digest}", cell, place)


def plan_shards(pairs: Sequence[Pair], rules: CutRules, splits: SplitRules) -> list[Shard]:
    """All chips of all pairs with split, distance to test and buffer applied, grouped into shards.

    Raises:
        DataError, ImageryError: an image that cannot be opened or is coarser than the chips.
    """
    blocks = [block for pair in pairs for block in _blocks(pair, rules)]
    chips = [chip for block in blocks for chip in block.chips]
    places = assign([chip.place for chip in chips], splits)
    reasons = drop_near_test(places, splits.buffer_m)
    distances = distance_to_test(places, max(4 * splits.buffer_m, 1000.0))
    done = iter(
        replace(
            chip, place=place, reason=reason, test_distance_m=float(d) if d < float("inf") else float("nan")
        )
        for chip, place, reason, d in zip(chips, places, reasons, distances, strict=True)
    )
    by_split: dict[str, list[Block]] = {}
    for block in blocks:
        settled = [next(done) for _ in block.chips]
        for split in dict.fromkeys(chip.place.split for chip in settled):
            part = tuple(chip for chip in settled if chip.place.split == split)
            by_split.setdefault(split, []).append(replace(block, chips=part))
    return [shard for split, parts in by_split.items() for shard in _shards(split, parts, rules)]


def _shards(split: str, blocks: Sequence[Block], rules: CutRules) -> Iterator[Shard]:
    group: list[Block] = []
    for i, block in enumerate(blocks):
        group.append(block)
        full = sum(len(b.chips) for b in group) >= _CHIPS_PER_SHARD
        if full or i == len(blocks) - 1:
            facts = [
                (b.pair.id, b.pair.site, b.pair.kind, b.pair.licence, [(c.id, c.reason) for c in b.chips])
                for b in group
            ]
            key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
            yield Shard(split, key, tuple(group), rules)
            group = []
