"""Footprints over a whole map, predicted from imagery by a GEDI model: shots where the satellite took none.

As published, the map is then matched to the model's prediction over the area, not to single shots.

Samples for the GEDI model: image, facts and height of footprints, real or simulated from lidar.

Training the GEDI model: L1 on relative heights, whole regions held out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from canopy.calibration.discs import Footprints, local_xy, map_grid
from canopy.chips.augment import vary_colour
from canopy.errors import ConfigError, DataError
from canopy.geo.crs import transformer
from canopy.models.gedi import CROP_PX, FACTS, GSD_M, GediModel, load_gedi_model
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    import pandas

    from canopy.chips.store import Chip
    from canopy.geo.grid import Grid
    from canopy.imagery.base import ImagerySource


MOST = 1_000
_ROOM_M = 13.0


def predicted_footprints(
    map_path: str | Path, model_path: str | Path, source: ImagerySource, *, most: int = MOST
) -> Footprints:
    """Footprints on an even lattice over a map, with the heights that a GEDI model sees in the imagery.

    Raises:
        CheckpointError: no GEDI model. DataError: the imagery shows none of the map.
    """
    import pandas

    from canopy.labels.footprint import pool_over_disc

    model = load_gedi_model(model_path)
    grid = map_grid(map_path)
    lon, lat = lattice(grid, most)
    values = pool_over_disc(Path(map_path), pandas.DataFrame({"lon": lon, "lat": lat}), f"p{model.rh}")
    known = np.isfinite(values)
    lon, lat, values = lon[known], lat[known], values[known]
    rgb, seen = crops_at(source, lon, lat)
    if not seen.any():
        raise DataError(
            "the imagery shows none of the map", where=source.name, remedy="use the map's imagery"
        )
    facts = np.full((int(seen.sum()), len(FACTS)), np.nan, np.float32)
    facts[:, 0], facts[:, 1] = lat[seen], lon[seen]
    heights = predict_gedi(model, rgb[seen], facts).astype(np.float64)
    xy = local_xy(grid, lon[seen], lat[seen])
    return Footprints(heights, values[seen, None].astype(np.float64), xy, model.rh)


def lattice(grid: Grid, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of at most about `most` places, evenly over a map, off its edge."""
    height, width = grid.shape
    room = _ROOM_M / grid.gsd_m
    step = max(25.0 / grid.gsd_m, float(np.sqrt(height * width / most)))
    rows, cols = (np.arange(room + step / 2, n - room, step) for n in (height, width))
    row, col = (v.ravel() for v in np.meshgrid(rows, cols, indexing="ij"))
    west, _, _, north = grid.bounds
    px, py = grid.pixel
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(west + col * px, north - row * py)
    return np.asarray(lon), np.asarray(lat)


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
    from canopy.labels.shots import rh_column

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
    from canopy.models.height import fill_invalid

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


def split_regions(samples: Samples, held_out: Sequence[str]) -> tuple[Samples, Samples]:
    """Samples of all other regions, and of the held-out ones (names may be beginnings).

    Raises:
        DataError: a name that is no region, or nothing left to train on.
    """
    regions = sorted(set(samples.region.tolist()))
    chosen = np.zeros(len(samples), bool)
    for name in held_out:
        at = np.array([str(r).startswith(name) for r in samples.region])
        if not at.any():
            raise DataError(f"no region {name!r}", expected=f"one of: {', '.join(regions)}")
        chosen |= at
    if chosen.all() or not chosen.any():
        raise DataError("no samples on one side of the split", expected=f"some of: {', '.join(regions)}")
    return samples.take(~chosen), samples.take(chosen)


def train_gedi(
    samples: Samples,
    *,
    rh: int = 98,
    steps: int = 600,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    width: int = 24,
    minutes: float | None = None,
    progress: Progress | None = None,
) -> GediModel:
    """Train from scratch with AdamW, a warm-up, a cosine learning rate and the L1 loss (as published).

    Images are turned, mirrored and varied in colour; facts are hidden half of the time, so that the
    model also works without them and leans on the image.

    Args:
        width: channels of the first stage; the model grows with its square.
        minutes: stop there at the latest; the learning rate falls to nothing by then.

    Raises:
        ConfigError: steps or batch below 1.
    """
    if steps < 1 or batch < 1:
        raise ConfigError(f"{steps} steps of {batch} samples", expected="at least 1 of each")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = GediModel(rh, width).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    progress = progress or NoProgress()
    progress.start(steps, "training")
    started = time.perf_counter()
    # Rare heights are drawn more often: a plain draw would teach the mean.
    weights = _flat_by_height(samples.height_m)
    for step in range(steps):
        done = max(step / steps, (time.perf_counter() - started) / (60 * minutes) if minutes else 0.0)
        if done >= 1:
            log.info(f"stopped after {step} steps: time is up")
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, done / 0.1 + 0.01) * (0.5 + 0.5 * np.cos(np.pi * done))
        chosen = rng.choice(len(samples), batch, p=weights)
        rgb, facts = _augmented(samples, chosen, rng)
        loss = (model(rgb, facts) - torch.from_numpy(samples.height_m[chosen])).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        progress.advance()
        if step % 100 == 0:
            log.info(f"step {step}: L1 {loss.item():.2f} m")
    return model.eval()


def _flat_by_height(height_m: np.ndarray) -> np.ndarray:
    counts = np.bincount((height_m / 5).astype(int))
    weights = 1 / np.sqrt(counts[(height_m / 5).astype(int)])
    return weights / weights.sum()


def _augmented(samples: Samples, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    crops = []
    for i in chosen:
        rgb = samples.rgb[i].astype(np.float32) / 255.0
        rgb = np.rot90(rgb, int(rng.integers(4)), axes=(1, 2))
        rgb = np.ascontiguousarray(rgb[:, :, ::-1] if rng.random() < 0.5 else rgb)
        crops.append(vary_colour(rgb, rng, 0.7 * rng.random()))
    facts = samples.facts[chosen].copy()
    facts[rng.random(len(chosen)) < 0.5] = np.nan
    return torch.from_numpy(np.stack(crops).astype(np.float32)), torch.from_numpy(facts)


@torch.inference_mode()
def predict_gedi(model: GediModel, rgb: np.ndarray, facts: np.ndarray, batch: int = 64) -> np.ndarray:
    """Relative heights (n,) float32 of uint8 crops (n, 3, 128, 128) and facts (n, 5)."""
    parts = [
        model(
            torch.from_numpy(rgb[i : i + batch].astype(np.float32) / 255.0),
            torch.from_numpy(facts[i : i + batch].astype(np.float32)),
        ).numpy()
        for i in range(0, len(rgb), batch)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def score_gedi(model: GediModel, samples: Samples, constant_m: float) -> dict[str, Any]:
    """MAE, bias and correlation on samples, beside the MAE of a constant (the training median)."""
    # Regions that were held out are far from the places the model knows: they must not be told.
    predicted = predict_gedi(model, samples.rgb, np.full_like(samples.facts, np.nan))
    error = predicted - samples.height_m
    varies = predicted.std() > 1e-6 and samples.height_m.std() > 1e-6
    return {
        "n": len(samples),
        "mae_m": round(float(np.abs(error).mean()), 3),
        "bias_m": round(float(error.mean()), 3),
        "r": round(float(np.corrcoef(predicted, samples.height_m)[0, 1]), 3) if varies else None,
        "mae_constant_m": round(float(np.abs(samples.height_m - constant_m).mean()), 3),
    }
