"""Predictions beside lidar, chip by chip: what every calibration is fitted on and checked with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from canopy.chips.store import IMAGE_GSD_M, ChipShards, predict_chip
from canopy.errors import ConfigError, DataError
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import torch

    from canopy.chips.store import Chip
    from canopy.models.height import HeightModel


# Side of the blocks that are taken as exchangeable, in metres: several times the distance over which errors
# of neighbouring pixels look alike, and still many of them in a tile.
BLOCK_M = 32
_OVERLAP_SHARE = 3 / 8
_LEAST_CROP_PX = 256
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


class Cells(NamedTuple):
    """The known cells of several chips in rows; all arrays (n,).

    Attributes:
        height_m, spread_m, truth_m: metres.
        block: number of the exchangeable block that a cell lies in, counted over all chips.
    """

    height_m: np.ndarray
    spread_m: np.ndarray
    truth_m: np.ndarray
    block: np.ndarray


def load_chips(data: str | Path, splits: Sequence[str]) -> tuple[list[Chip], str]:
    """Chips of the named splits of a chips folder (`canopy data chips`), and a text that identifies them.

    Raises:
        DataError: it is none, has nothing of the splits, or its images are not of 0.5 m, by which distances
            and blocks are counted.
    """
    shards = ChipShards(data, splits=splits)
    shards.require_gsd(IMAGE_GSD_M)
    return list(shards), shards.fingerprint


def check_gsd(model: HeightModel, where: object) -> None:
    """Raises ConfigError for a model that expects other pixels than calibration chips have."""
    if abs(model.config.gsd_m / IMAGE_GSD_M - 1) > _GSD_SHARE:
        raise ConfigError(
            f"the model expects pixels of {model.config.gsd_m:g} m", where=where,
            expected=f"{IMAGE_GSD_M:g} m, as calibration chips have",
        )  # fmt: skip


def places_of(chips: Sequence[Chip]) -> list[tuple[float, float]]:
    """Where chips lie: (lon, lat) to about a kilometre, each once; those that do not say are left out."""
    from canopy.geo.crs import transformer

    found = set()
    for row in (chip.row for chip in chips if chip.row.crs):
        x, y = (row.west + row.east) / 2, (row.south + row.north) / 2
        lon, lat = transformer(row.crs, "EPSG:4326").transform(x, y)
        found.add((round(lon, 2), round(lat, 2)))
    return sorted(found)


def predict_chips(
    model: HeightModel,
    chips: Sequence[Chip],
    *,
    layers: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Iterator[Scored]:
    """Predict every chip as the map's engine would, and put its lidar beside it.

    `layers`: another runtime's heights and spreads of crops (n, 3, h, w), in place of the model's.
    """
    import torch

    def network(crops: np.ndarray) -> np.ndarray:
        return (layers or model.layers)(torch.from_numpy(crops)).float().numpy()

    progress = progress or NoProgress()
    progress.start(len(chips), "predicting")
    for chip in chips:
        # A crop beyond the chip would show the network nothing but filling.
        side = min(model.config.crop_px, max(_LEAST_CROP_PX, -(-max(chip.rgb.shape[1:]) // 64) * 64))
        with torch.inference_mode():
            maps = predict_chip(network, chip, side, side * _OVERLAP_SHARE)
        gone = ~chip.scored
        maps[:, gone] = np.nan
        truth = np.where(gone, np.nan, chip.chm_m).astype(np.float32)
        yield Scored(chip.row.id, chip.row.site, chip.row.split, maps[0], maps[1], truth)
        progress.advance()


def cells_of(scored: Sequence[Scored]) -> Cells:
    """The known cells of chips, with the block each lies in.

    Raises:
        DataError: there is none.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    blocks = 0
    for chip in scored:
        known = chip.known
        rows, cols = np.nonzero(known)
        block = rows // BLOCK_M * -(-known.shape[1] // BLOCK_M) + cols // BLOCK_M + blocks
        parts.append((chip.height_m[known], chip.spread_m[known], chip.truth_m[known], block))
        blocks = int(block.max()) + 1 if len(block) else blocks
    if not any(len(part[0]) for part in parts):
        raise DataError("no cell with both image and lidar")
    return Cells(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def halves(scored: Sequence[Scored]) -> tuple[list[Scored], list[Scored]]:
    """Chips dealt into two halves in order of sites and names, so that both see every site."""
    ranked = sorted(scored, key=lambda chip: (chip.site, chip.id))
    return ranked[::2], ranked[1::2]
