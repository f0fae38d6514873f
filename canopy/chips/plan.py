"""From a manifest of image and height pairs to the chips to cut: windows, splits, ids and shards.

Only headers are read here, and every file once for its hash; pixels come later (`canopy.chips.cut`).

Neighbouring chips share trees, light and camera, so a random split flatters a model. A chip's split follows
from where its centre lies, and what would be trained on near a test chip is dropped, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas
import pyproj
import shapely

from canopy.chips.options import CutOptions, SplitOptions
from canopy.chips.store import SHARDS
from canopy.errors import DataError
from canopy.files import check_name, file_sha256
from canopy.geo.crs import METRES_PER_DEGREE, transformer, utm_crs
from canopy.geo.grid import Grid
from canopy.imagery.base import ImagerySource
from canopy.imagery.open import open_imagery
from canopy.labels.catalog import sensor_floor

FORMAT = 3  # raise it when the same inputs would give other chips
LABEL_FACTOR = 2  # image pixels to a label pixel, as the chips store and the models have it
TEST, TRAIN, VAL = "test", "train", "val"
TOO_CLOSE = "too close to a test chip"
_BLOCK_CHIPS = 4  # chips to a side that are read, registered and stored together
_NEON_FLOOR_M = 2.0  # where a NEON label's sensor is not told: the higher of the two
_MERCATOR = "EPSG:3395"  # conformal on the ellipsoid: one scale in all directions


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
    """A window (row, col, height, width) of a pair's image grid.

    Attributes:
        bounds: west, south, east, north in `crs`.
        split: '' = not given yet; any that begins with 'test' is for final scores.
        reason: why it is not to be cut, or ''.
        test_distance_m: to the nearest test chip; NaN where none is near.
    """

    id: str
    window: tuple[int, int, int, int]
    site: str
    crs: str
    bounds: tuple[float, float, float, float]
    split: str = ""
    reason: str = ""
    test_distance_m: float = float("nan")

    @property
    def is_test(self) -> bool:
        return self.split.startswith(TEST)


@dataclass(frozen=True)
class Shard:
    """Neighbouring chips of one pair and split: read and registered together, written into one file.

    `key` stands for everything that decides the file's content.
    """

    pair: Pair
    grid: Grid
    chips: tuple[PlannedChip, ...]
    options: CutOptions

    @property
    def key(self) -> str:
        pair = self.pair
        facts = [pair.id, pair.site, pair.kind, pair.licence, [(c.id, c.reason) for c in self.chips]]
        return _digest(facts)

    def path(self, folder: Path) -> Path:
        """Its file in a chips folder."""
        return folder / SHARDS / f"{self.chips[0].split}-{self.key}.safetensors"


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


# ---- the manifest -----------------------------------------------------------------------------------
def read_pairs(manifest: str | Path, limit: int | None = None) -> list[Pair]:
    """Pairs of a CSV or Parquet manifest; paths in it are relative to it.

    Columns: rgb_path, chm_path; optional id (else the image's file name), site, kind, split, crs (for images
    that carry none), date_rgb or year_rgb, date_chm or year_chm, sensor or floor_m, gedi_path, licence.
    Others are ignored. A row may leave chm_path empty: an image without heights, for pretraining.

    Raises:
        DataError: a missing file or column, an id used twice or unfit for a name, or bad values.
    """
    path = Path(manifest)
    rows = _rows(path)[:limit]
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


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError("no such manifest", where=path)
    kind = "Parquet" if path.suffix == ".parquet" else "CSV"
    try:
        if kind == "Parquet":
            table = pandas.read_parquet(path)
        else:
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise DataError(f"is not a {kind} table ({error})", where=path) from error
    records = table.to_dict("records")
    return [{str(k): "" if v is None or v != v else str(v) for k, v in row.items()} for row in records]


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


def _blocks(pair: Pair, options: CutOptions) -> Iterator[Shard]:
    """The chips of a pair, not split yet, in blocks of neighbours."""
    source = open_imagery(pair.rgb, crs=pair.crs or None)
    if source.native_gsd_m > 1.51 * options.gsd_m:  # 0.75 m on a map is a little more on the ground
        raise DataError(
            f"an image of {source.native_gsd_m:.2g} m for chips of {options.gsd_m:g} m", where=pair.rgb
        )
    grid = image_grid(source, options.gsd_m)
    rows, cols = (edges(n, options.size_px) for n in grid.shape)
    for i in range(0, len(rows) - 1, _BLOCK_CHIPS):
        for j in range(0, len(cols) - 1, _BLOCK_CHIPS):
            cells = [
                (rows[a], cols[b], rows[a + 1] - rows[a], cols[b + 1] - cols[b])
                for a in range(i, min(i + _BLOCK_CHIPS, len(rows) - 1))
                for b in range(j, min(j + _BLOCK_CHIPS, len(cols) - 1))
            ]
            yield Shard(pair, grid, tuple(_chip(pair, grid, cell, options) for cell in cells), options)


def _chip(pair: Pair, grid: Grid, cell: tuple[int, int, int, int], options: CutOptions) -> PlannedChip:
    facts = [FORMAT, options.model_dump(), pair.sha256, pair.crs, pair.gap_years, pair.floor_m, cell]
    crs = f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else grid.crs.to_wkt()
    name = f"{pair.id}-{cell[0]}-{cell[1]}-{_digest(facts)}"
    return PlannedChip(name, cell, pair.site, crs, grid.window(*cell).bounds, pair.split)


def plan_shards(pairs: Sequence[Pair], options: CutOptions, splits: SplitOptions) -> list[Shard]:
    """All chips of all pairs with split, distance to test and buffer applied, one shard per block and split.

    Raises:
        DataError, ImageryError: an image that cannot be opened or is coarser than the chips.
    """
    blocks = [block for pair in pairs for block in _blocks(pair, options)]
    settled = iter(settle([chip for block in blocks for chip in block.chips], splits))
    shards = []
    for block in blocks:
        chips = [next(settled) for _ in block.chips]
        for split in dict.fromkeys(chip.split for chip in chips):
            part = tuple(chip for chip in chips if chip.split == split)
            shards.append(replace(block, chips=part))
    return shards


# ---- splits by place --------------------------------------------------------------------------------
def settle(chips: Sequence[PlannedChip], options: SplitOptions) -> list[PlannedChip]:
    """Fill in missing splits, distances to test, and the reason of train chips within the buffer.

    Given splits are kept, also against `held_out`: they must not contradict it. The same ground gets the same
    split whatever site, file or date it came from: blocks are counted from the equator and Greenwich, and
    which split a block falls to follows from its numbers and the seed.

    Raises:
        DataError: a held-out site has chips that were given as train or val, or matches no site.
    """
    sites = {chip.site for chip in chips}
    for pattern in options.held_out:
        if not any(fnmatchcase(site, pattern) for site in sites):
            raise DataError(
                f"no site is called {pattern!r}", expected=f"one of {', '.join(sorted(sites))[:300]}"
            )
    lon, lat = transformer(_MERCATOR, "EPSG:4326").transform(*_corners(chips).mean(axis=1).T)
    out = []
    for chip, x, y in zip(chips, lon, lat, strict=True):
        held_out = any(fnmatchcase(chip.site, pattern) for pattern in options.held_out)
        if held_out and chip.split and not chip.is_test:
            raise DataError(f"site {chip.site!r} is held out, but has chips given as {chip.split}")
        split = chip.split or (TEST if held_out else _split_of_block(x, y, options))
        out.append(replace(chip, split=split))
    distances = distance_to_test(out, max(4 * options.buffer_m, 1000.0))
    return [
        replace(
            chip,
            test_distance_m=float(distance),
            reason=TOO_CLOSE if chip.split == TRAIN and distance <= options.buffer_m else "",
        )
        for chip, distance in zip(out, distances, strict=True)
    ]


def _split_of_block(lon: float, lat: float, options: SplitOptions) -> str:
    row = int(np.floor(lat * METRES_PER_DEGREE / options.block_m))
    # One scale per row of blocks, so that blocks stay square and their edges meet.
    scale = METRES_PER_DEGREE * np.cos(np.radians(row * options.block_m / METRES_PER_DEGREE))
    col = int(np.floor(lon * max(scale, 1.0) / options.block_m))
    digest = hashlib.sha256(f"{options.seed}/{options.block_m:g}/{row}/{col}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return TEST if draw < options.test else VAL if draw < options.test + options.val else TRAIN


def distance_to_test(chips: Sequence[PlannedChip], reach_m: float) -> np.ndarray:
    """Metres (n,) from each chip's edge to the nearest test chip's, 0 where they overlap; NaN beyond
    `reach_m` and for test chips themselves. Whatever CRSs they are in; not across the date line."""
    out = np.full(len(chips), np.nan)
    test = np.array([chip.is_test for chip in chips], bool)
    if not test.any() or test.all():
        return out
    corners = _corners(chips)
    shapes = shapely.polygons(corners)
    _, distance = shapely.STRtree(shapes[test]).query_nearest(
        shapes[~test], return_distance=True, all_matches=False
    )
    lon, lat = transformer(_MERCATOR, "EPSG:4326").transform(*corners[~test].mean(axis=1).T)
    stretch = (
        pyproj.Proj(_MERCATOR).get_factors(lon, lat).meridional_scale
    )  # the map's metres to the ground's
    distance = distance / stretch
    out[~test] = np.where(distance <= reach_m, distance, np.nan)
    return out


def _corners(chips: Sequence[PlannedChip]) -> np.ndarray:
    """Corners (n, 4, 2) of chips, x and y in world Mercator."""
    out = np.empty((len(chips), 4, 2))
    crs_of = np.array([chip.crs for chip in chips], object)
    bounds = np.array([chip.bounds for chip in chips], float)
    for crs in dict.fromkeys(crs_of):
        members = np.flatnonzero(crs_of == crs)
        x, y = transformer(crs, _MERCATOR).transform(bounds[members][:, [0, 2, 2, 0]],
                                                     bounds[members][:, [1, 1, 3, 3]])  # fmt: skip
        out[members] = np.stack([x, y], axis=-1)
        if not np.isfinite(out[members]).all():
            raise DataError("a chip lies outside its CRS's domain", where=chips[int(members[0])].site)
    return out
