"""Predictions beside lidar, chip by chip: what every calibration is fitted on and checked with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.chips.store import IMAGE_GSD_M, LABEL_GSD_M, predict_chip
from canopy.errors import ConfigError, DataError
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    from canopy.chips.store import Chip
    from canopy.models.height import HeightModel


# Side of the blocks that are taken as exchangeable, in metres: several times the distance over which errors
# of neighbouring pixels look alike, and still many of them in a tile.
BLOCK_M = 32
_OVERLAP_SHARE = 3 / 8
_LEAST_CROP_PX = 256
_PLACE = ("crs", "xmin", "ymin", "xmax", "ymax")
_GSD_SHARE = 0.05


@dataclass(frozen=True)
class Scored:
    """One chip, predicted; all arrays float32 (h, w) at 1 m, NaN where image or lidar is missing.

    Attributes:
        id, site, split: of the chip.
        height_m: predicted height, the mean of the cell's pixels.
        spread_m: the network's spread, likewise.
        truth_m: lidar.
    """

    id: str
    site: str
    split: str
    height_m: np.ndarray
    spread_m: np.ndarray
    truth_m: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Bool (h, w): cells that count."""
        return np.isfinite(self.truth_m) & np.isfinite(self.height_m)


@dataclass(frozen=True)
class Cells:
    """The known cells of several chips in rows; all arrays (n,).

    Attributes:
        height_m, spread_m, truth_m: metres.
        block: number of the exchangeable block that a cell lies in, counted over all chips.
        chip: number of its chip.
    """

    height_m: np.ndarray
    spread_m: np.ndarray
    truth_m: np.ndarray
    block: np.ndarray
    chip: np.ndarray


def load_chips(data: str | Path, splits: Sequence[str]) -> tuple[list[Chip], str]:
    """Chips of the named splits, and a text that identifies the data.

    Args:
        data: a data pack (folder with manifest.csv), a chips folder (`canopy data chips`), or a chips file.

    Raises:
        DataError: it is none of these, has nothing of the splits, or its images are not of 0.5 m or its
            heights not of 1 m, by which distances and blocks are counted.
    """
    path = Path(data)
    if path.is_file():
        from canopy.chips.store import read_store

        store = read_store(path)
        chips, identity = store.of_split(*splits), store.data_sha256
    elif (path / "manifest.csv").is_file():
        from canopy.chips.cut import read_pack

        chips, identity = read_pack(path, tuple(splits))
    elif path.is_dir():
        from canopy.chips.store import ChipShards

        shards = ChipShards(path, splits=splits)
        for row in shards.rows:
            if not (_same(row.gsd_m, IMAGE_GSD_M) and _same(row.label_gsd_m, LABEL_GSD_M)):
                raise DataError(
                    f"chip {row.id} has pixels of {row.gsd_m:g} m and heights of {row.label_gsd_m:g} m",
                    where=path, expected=f"{IMAGE_GSD_M:g} and {LABEL_GSD_M:g} m",
                    remedy=f"cut chips with canopy data chips --gsd {IMAGE_GSD_M:g}",
                )  # fmt: skip
        chips, identity = list(shards), shards.fingerprint
    else:
        raise DataError("no such data", where=path, expected="a data pack, a chips folder or a chips file")
    if not chips:
        raise DataError(f"no chips of {', '.join(splits)}", where=path, remedy="choose other --splits")
    return chips, identity


def check_gsd(model: HeightModel, where: object) -> None:
    """Raises ConfigError for a model that expects other pixels than calibration chips have."""
    if not _same(model.config.gsd_m, IMAGE_GSD_M):
        raise ConfigError(
            f"the model expects pixels of {model.config.gsd_m:g} m", where=where,
            expected=f"{IMAGE_GSD_M:g} m, as calibration chips have",
        )  # fmt: skip


def _same(gsd_m: float, wanted_m: float) -> bool:
    """Whether pixels are so near the wanted size that nothing comes of it."""
    return abs(gsd_m / wanted_m - 1) <= _GSD_SHARE


def places_of(data: str | Path) -> dict[str, tuple[float, float]]:
    """(lon, lat) of the middle of every chip of a data pack or chips folder, by id.

    Empty for a chips file, and for a pack whose manifest lacks crs, xmin, ymin, xmax or ymax.

    Raises:
        DataError: a place that cannot be read.
    """
    import csv

    path = Path(data)
    if (path / "manifest.csv").is_file():
        with (path / "manifest.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not rows[0].keys() >= {"id", *_PLACE}:
            return {}
        boxes = {row["id"]: [row[name] for name in _PLACE] for row in rows if row["crs"]}
    elif path.is_dir():
        from canopy.chips.index import read_index

        boxes = {r.id: [r.crs, r.west, r.south, r.east, r.north] for r in read_index(path) if r.crs}
    else:
        return {}
    return {name: _lonlat(name, box, path) for name, box in boxes.items()}


def _lonlat(name: str, box: Sequence[Any], where: Path) -> tuple[float, float]:
    """The middle of a box (crs, west, south, east, north). Raises DataError."""
    from canopy.geo.crs import transformer

    try:
        crs, (west, south, east, north) = box[0], map(float, box[1:])
        lon, lat = transformer(crs, "EPSG:4326").transform((west + east) / 2, (south + north) / 2)
    except (TypeError, ValueError) as error:  # an unreadable CRS is a ValueError too
        raise DataError(f"chip {name} has no usable place ({error})", where=where) from error
    if not np.isfinite([lon, lat]).all():
        raise DataError(f"chip {name} lies nowhere in {crs}", where=where)
    return float(lon), float(lat)


def predict_chips(
    model: HeightModel, chips: Sequence[Chip], *, batch: int = 4,
    progress: Progress | None = None,
) -> Iterator[Scored]:  # fmt: skip
    """Predict every chip as the map's engine would, and put its lidar beside it."""
    import torch

    progress = progress or NoProgress()
    progress.start(len(chips), "predicting")
    model = model.eval()
    for chip in chips:
        with torch.inference_mode():
            layers = _predict(model, chip, batch)
        gone = ~chip.scored
        layers[:, gone] = np.nan
        truth = np.where(gone, np.nan, chip.chm_m).astype(np.float32)
        yield Scored(chip.row.id, chip.row.site, chip.row.split, layers[0], layers[1], truth)
        progress.advance()


def _predict(model: HeightModel, chip: Chip, batch: int) -> np.ndarray:
    """Height and spread (2, h, w) at 1 m of a chip, from crops that overlap by three eighths or more."""
    import torch

    def network(crops: np.ndarray) -> np.ndarray:
        return model.layers(torch.from_numpy(crops), ("height_m", "spread_m")).float().numpy()

    # A crop beyond the chip would show the network nothing but filling.
    side = min(model.config.crop_px, max(_LEAST_CROP_PX, -(-max(chip.rgb.shape[1:]) // 64) * 64))
    return predict_chip(network, chip, side, side * _OVERLAP_SHARE, batch)


def cells_of(scored: Sequence[Scored], block_m: int = BLOCK_M) -> Cells:
    """The known cells of chips, with the block each lies in.

    Raises:
        DataError: there is none.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    blocks = 0
    for number, chip in enumerate(scored):
        known = chip.known
        rows, cols = np.nonzero(known)
        across = -(-known.shape[1] // block_m)
        _, block = np.unique(rows // block_m * across + cols // block_m, return_inverse=True)
        parts.append(
            (chip.height_m[known], chip.spread_m[known], chip.truth_m[known], block + blocks,
             np.full(len(rows), number))
        )  # fmt: skip
        blocks += int(block.max()) + 1 if len(block) else 0
    if not any(len(part[0]) for part in parts):
        raise DataError("no cell with both image and lidar")
    return Cells(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def halves(scored: Sequence[Scored]) -> tuple[list[Scored], list[Scored]]:
    """Chips dealt into two halves, site by site in order of their names, so that both see every site."""
    first: list[Scored] = []
    second: list[Scored] = []
    for site in dict.fromkeys(chip.site for chip in scored):
        members = sorted((c for c in scored if c.site == site), key=lambda c: c.id)
        for number, chip in enumerate(members):
            (first if number % 2 == 0 else second).append(chip)
        first, second = second, first  # an odd chip goes to the other half next time
    return first, second
