"""From a manifest of image and height pairs to the chips to cut: windows, splits, ids and shards.

Only headers are read here, and every file once for its hash; pixels come later (`canopy.chips.cut`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from canopy.chips.splits import Place, SplitRules, assign, distance_to_test, drop_near_test
from canopy.chips.targets import RULES, sensor_floor
from canopy.errors import DataError, InputError
from canopy.files import check_name, file_sha256
from canopy.geo.crs import utm_crs
from canopy.geo.grid import Grid
from canopy.imagery.base import ImagerySource
from canopy.imagery.open import open_imagery

FORMAT = 2  # raise it when the same inputs would give other bytes
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
    import pandas

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
