"""One augmented training crop of a chip: image, heights, what they are worth, and the GEDI shots in it.

Views for self-supervised pretraining: global and local crops of an image, block masks over patches.

Pure functions of an image and a generator. Crops: DINO (Caron et al. 2021, arXiv 2104.14294); block masks:
BEiT (Bao et al. 2021, arXiv 2106.08254), as iBOT and DINOv2 use them.

torch Datasets over a chips folder: endless training batches, pretraining views.

Batch j is a function of (chips, seed, j) alone, whatever the number of workers: worker k of n makes batches
k, k + n, ... and torch's DataLoader (with `batch_size=None`) hands them out in turn. So the state of a stream
is the number of batches consumed, and a resumed run sees exactly what it would have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset, get_worker_info

from canopy.chips.augment import AugmentConfig, dihedral, hide_part, turn, turn_points, vary_colour
from canopy.chips.store import ChipShards, IndexRow, ShardChip, sampling_weights
from canopy.chips.targets import FOOTPRINT_RADIUS_M
from canopy.errors import DataError, InputError
from canopy.models.height import fill_invalid

MAX_SHOTS = 16  # in one crop; a footprint every 60 m along eight tracks does not reach it in 128 m
_TRIES = 8
_BOOST_POWER, _MOST_BOOST = 0.7, 14.0


class Sample(NamedTuple):
    """One crop, or a batch of them with a leading B.

    Attributes:
        rgb: (3, S, S) in 0..1.
        target: (1, S/2, S/2) canopy height in metres, 0 where unknown.
        weight: (1, S/2, S/2) >= 0, 0 where unknown.
        shots: (K, 5) GEDI shots on the target's grid: row, col, height in metres, weight, radius of the
            disc; row, col and radius in target pixels, (0, 0) the upper-left corner. K is fixed, and rows
            without a shot have weight 0.
    """

    rgb: Tensor
    target: Tensor
    weight: Tensor
    shots: Tensor


class _Cut(NamedTuple):
    rgb: np.ndarray  # (3, S, S) float
    valid: np.ndarray  # (S, S)
    height: np.ndarray  # (S/2, S/2), NaN unknown
    weight: np.ndarray  # (S/2, S/2)
    shots: np.ndarray  # (n, 5)


def make_crop(
    chip: ShardChip, crop_px: int, rng: np.random.Generator, augment: AugmentConfig | None
) -> Sample:
    """A random window of a chip, moved and coloured as `augment` says; None cuts plain crops.

    Windows without labels are drawn again, a few times. Plots are small, so for them less is enough.
    """
    least = 0.005 if chip.row.kind == "neon" else 0.2
    for _ in range(_TRIES):
        cut = _cut(chip, crop_px, rng, augment)
        if (cut.weight > 0).mean() > least or len(cut.shots):
            break
    return _finish(cut, rng, augment)


def _cut(chip: ShardChip, crop_px: int, rng: np.random.Generator, augment: AugmentConfig | None) -> _Cut:
    factor = 1.0
    if augment is not None and rng.random() < augment.gsd_chance:
        factor = float(np.exp(rng.uniform(np.log(augment.gsd_low), np.log(augment.gsd_high))))
    side = 2 * round(crop_px * factor / 2)
    half = side // 2
    h, w = chip.chm_m.shape
    # A chip smaller than the window lies at a random place in it, with nothing around.
    row, col = (int(rng.integers(min(0, n - half), max(0, n - half) + 1)) for n in (h, w))
    rgb = np.zeros((3, side, side), np.float32)
    height = np.full((half, half), np.nan, np.float32)
    weight = np.zeros((half, half), np.float32)
    # Where the window leaves the chip: source rows r0:r1 land at target rows r0-row and on.
    r0, r1, c0, c1 = max(row, 0), min(row + half, h), max(col, 0), min(col + half, w)
    inside = np.s_[r0 - row : r1 - row, c0 - col : c1 - col]
    height[inside] = chip.chm_m[r0:r1, c0:c1]
    weight[inside] = chip.weight[r0:r1, c0:c1]
    rgb[:, 2 * (r0 - row) : 2 * (r1 - row), 2 * (c0 - col) : 2 * (c1 - col)] = chip.rgb[
        :, 2 * r0 : 2 * r1, 2 * c0 : 2 * c1
    ] / np.float32(255.0)
    shots = _shots_in(chip, row, col, half)
    cut = _Cut(rgb, rgb.max(axis=0) > 0, height, weight, shots)
    return cut if side == crop_px else _stretch(cut, crop_px)


def _shots_in(chip: ShardChip, row: int, col: int, half: int) -> np.ndarray:
    """Shots (n, 5) whose disc lies wholly in the window."""
    if not len(chip.shots):
        return np.zeros((0, 5), np.float32)
    radius = FOOTPRINT_RADIUS_M / chip.row.label_gsd_m
    place = chip.shots[:, :2] - np.array([row, col])
    inside = ((place >= radius) & (place <= half - radius)).all(axis=1)
    disc = np.full((len(place), 1), radius)
    return np.concatenate([place, chip.shots[:, 2:4], disc], axis=1)[inside].astype(np.float32)


def _stretch(cut: _Cut, crop_px: int) -> _Cut:
    """Resample a square cut to `crop_px`, never mixing known with unknown; heights stay what they are."""
    resized = functional.interpolate(
        torch.from_numpy(cut.rgb)[None], size=(crop_px, crop_px), mode="bilinear", antialias=True
    )[0].numpy()
    side, half = cut.valid.shape[0], cut.height.shape[0]
    pick = ((np.arange(crop_px) + 0.5) * side / crop_px).astype(int)
    valid = inner(cut.valid)[np.ix_(pick, pick)]
    pick = ((np.arange(crop_px // 2) + 0.5) * half / (crop_px // 2)).astype(int)
    at = np.ix_(pick, pick)
    zoom = (crop_px // 2) / half
    shots = cut.shots * np.array([zoom, zoom, 1, 1, zoom], np.float32)
    return _Cut(resized, valid, cut.height[at], cut.weight[at], shots)


def inner(valid: np.ndarray) -> np.ndarray:
    """Validity without its one-pixel inner edge, where interpolation reached outside."""
    from scipy import ndimage

    return valid if valid.all() else ndimage.binary_erosion(valid, np.ones((3, 3)), border_value=1)


def _finish(cut: _Cut, rng: np.random.Generator, options: AugmentConfig | None) -> Sample:
    rgb, valid, height, weight, shots = cut
    black = False
    if options is not None:
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        if not options.turn:
            turns, flip = 0, False
        rgb, valid, height, weight = (turn(a, turns, flip) for a in (rgb, valid, height, weight))
        shots = shots.copy()
        shots[:, :2] = turn_points(shots[:, :2], height.shape[0], turns, flip)
        # Most images nearly as they are, some far off: always far off is too hard to learn from at all.
        rgb = vary_colour(rgb, rng, options.colour * rng.random())
        if rng.random() < options.hide_chance:
            shown = hide_part(valid, rng)
            if shown.mean() > 0.02:
                valid = shown
        black = rng.random() < options.black_chance
    rgb = np.where(valid, rgb, 0.0) if black else fill_invalid(np.ascontiguousarray(rgb), valid)
    covered = valid[0::2, 0::2] & valid[1::2, 0::2] & valid[0::2, 1::2] & valid[1::2, 1::2]
    known = np.isfinite(height) & covered & (weight > 0)
    # A 20 m plot has 400 label pixels, a crop 16,384: left alone, plots would not count in a batch.
    boost = min(_MOST_BOOST, (known.size / max(int(known.sum()), 1)) ** _BOOST_POWER)
    return Sample(
        torch.from_numpy(np.ascontiguousarray(rgb, np.float32)),
        torch.from_numpy(np.where(known, height, 0.0).astype(np.float32)[None]),
        torch.from_numpy(np.where(known, weight * np.float32(boost), 0.0).astype(np.float32)[None]),
        torch.from_numpy(_fixed(shots, covered, known, rng)),
    )


def _fixed(shots: np.ndarray, covered: np.ndarray, known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shots as (MAX_SHOTS, 5). A shot counts where the image shows its whole disc, and the less the more of
    it lidar has measured: one number for 490 square metres says nothing new there."""
    out = np.zeros((MAX_SHOTS, 5), np.float32)
    out[:, 4] = 1.0
    if len(shots) > MAX_SHOTS:
        shots = shots[rng.permutation(len(shots))[:MAX_SHOTS]]
    rows, cols = np.ogrid[: covered.shape[0], : covered.shape[1]]
    for i, (row, col, metres, weight, radius) in enumerate(shots):
        disc = (rows + 0.5 - row) ** 2 + (cols + 0.5 - col) ** 2 <= radius**2
        worth = weight * (1 - known[disc].mean()) if disc.any() and covered[disc].all() else 0.0
        out[i] = row, col, metres, worth, radius
    return out


Rng = np.random.Generator


@dataclass(frozen=True)
class ViewRules:
    """Sizes are in pixels; areas are shares of the image's.

    Attributes:
        global_px, local_px: sides of the crops as the network sees them.
        globals_, locals_: how many.
        global_area, local_area: from what share of the image a crop is cut.
        aspect: most that a crop's sides may differ, as a ratio.
        colour: strength of the colour changes, see `augment.vary_colour`.
    """

    global_px: int = 224
    local_px: int = 96
    globals_: int = 2
    locals_: int = 8
    global_area: tuple[float, float] = (0.32, 1.0)
    local_area: tuple[float, float] = (0.05, 0.32)
    aspect: float = 4 / 3
    colour: float = 0.8


def multi_crop(
    rgb: np.ndarray, valid: np.ndarray, rng: Rng, rules: ViewRules | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Global and local crops of one image, each turned, recoloured and resized on its own.

    Args:
        rgb: float (3, H, W) in 0..1; valid: bool (H, W). Missing pixels are filled (`models.fill`).

    Returns:
        float32 (globals, 3, G, G) and (locals, 3, L, L), in 0..1.
    """
    rules = rules or ViewRules()
    if rgb.ndim != 3 or valid.shape != rgb.shape[1:]:
        raise InputError(f"image {rgb.shape} and validity {valid.shape} do not match")
    full = fill_invalid(np.ascontiguousarray(rgb), valid)
    wide = [view(full, rules.global_px, rules.global_area, rng, rules) for _ in range(rules.globals_)]
    near = [view(full, rules.local_px, rules.local_area, rng, rules) for _ in range(rules.locals_)]
    shapes = (0, 3, rules.global_px, rules.global_px), (0, 3, rules.local_px, rules.local_px)
    return tuple(  # type: ignore[return-value]
        np.stack(v) if v else np.zeros(s, np.float32) for v, s in zip((wide, near), shapes, strict=True)
    )


def view(rgb: np.ndarray, side_px: int, area: tuple[float, float], rng: Rng, rules: ViewRules) -> np.ndarray:
    """One crop: float32 (3, side_px, side_px)."""
    top, left, height, width = crop_box(rgb.shape[1:], area, rules.aspect, rng)
    crop = _resize(rgb[:, top : top + height, left : left + width], side_px)
    (crop,) = dihedral(rng, crop)
    crop = vary_colour(np.ascontiguousarray(crop), rng, rules.colour * rng.random())
    return np.ascontiguousarray(crop, np.float32)


def crop_box(
    shape: tuple[int, ...], area: tuple[float, float], aspect: float, rng: Rng
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random box inside (H, W) with a share of its area in `area`."""
    H, W = shape
    share = rng.uniform(*area)
    lean = np.exp(rng.uniform(-np.log(aspect), np.log(aspect)) / 2)
    height = int(np.clip(round(np.sqrt(share) * H * lean), 1, H))
    width = int(np.clip(round(share * H * W / height), 1, W))
    return int(rng.integers(0, H - height + 1)), int(rng.integers(0, W - width + 1)), height, width


def _resize(rgb: np.ndarray, side_px: int) -> np.ndarray:
    import torch
    from torch.nn import functional

    tensor = torch.from_numpy(np.ascontiguousarray(rgb, np.float32))[None]
    size = (side_px, side_px)
    return functional.interpolate(tensor, size=size, mode="bilinear", antialias=True)[0].clamp(0, 1).numpy()


def block_mask(shape: tuple[int, int], ratio: float, rng: Rng, *, least: int = 4) -> np.ndarray:
    """Mask exactly round(ratio * rows * cols) patches, in blocks as far as they fit.

    Args:
        shape: (rows, cols) of the patch grid.
        ratio: share to mask, 0..1.
        least: patches in the smallest block.

    Returns:
        bool (rows, cols), True = masked.
    """
    rows, cols = shape
    if not 0 <= ratio <= 1 or rows < 1 or cols < 1:
        raise InputError(f"mask of {ratio} on {rows} x {cols} patches", expected="a share in 0..1")
    wanted = round(ratio * rows * cols)
    mask = np.zeros(shape, bool)
    for _ in range(40):
        room = wanted - int(mask.sum())
        if room < least:
            break
        size = rng.uniform(least, max(room, least))
        lean = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)) / 2)
        h = int(np.clip(round(np.sqrt(size) * lean), 1, rows))
        w = int(np.clip(round(np.sqrt(size) / lean), 1, cols))
        top, left = int(rng.integers(0, rows - h + 1)), int(rng.integers(0, cols - w + 1))
        block = mask[top : top + h, left : left + w]
        if 0 < (~block).sum() <= room:
            block[:] = True
    free = np.flatnonzero(~mask)
    rest = rng.choice(free, wanted - int(mask.sum()), replace=False)  # the count is exact, by single patches
    mask.flat[rest] = True
    return mask


def batch_masks(
    count: int,
    shape: tuple[int, int],
    rng: Rng,
    *,
    chance: float = 0.5,
    ratios: tuple[float, float] = (0.1, 0.5),
) -> np.ndarray:
    """Masks bool (count, rows, cols) for a batch: a share `chance` of them masked, their ratios spread evenly
    over `ratios`, so that a batch always has the same number of masked patches; order shuffled."""
    masked = round(count * chance)
    steps = np.linspace(*ratios, masked + 1)
    out = np.zeros((count, *shape), bool)
    for i, k in enumerate(rng.permutation(count)[:masked]):
        out[k] = block_mask(shape, (steps[i] + steps[i + 1]) / 2, rng)
    return out


T = TypeVar("T")


class ChipSource(Protocol):
    """Chips by number: `ChipShards`, or anything that looks like it."""

    rows: list[IndexRow]

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> ShardChip: ...


class _Batches(IterableDataset[T], Generic[T], ABC):
    """Endless, resumable batches; a subclass says what batch number j is.

    Process r of n takes batch j * n + r as its j-th, so all together see what one would with a batch n times
    as large.

    Use with `DataLoader(stream, batch_size=None, num_workers=n)`; after each batch the consumer calls
    `advance()`, so that `state_dict()` counts what was used and not what was made ahead.
    """

    def __init__(self, shards: ChipSource, batch: int, seed: int) -> None:
        if batch < 1:
            raise DataError(f"batch of {batch}", expected="at least 1")
        self.shards, self.batch, self.seed = shards, batch, seed
        self.position = 0
        self.rank, self.world = 0, 1

    def split(self, rank: int, world: int) -> None:
        """Serve process `rank` of `world`."""
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[T]:
        worker = get_worker_info()
        number = self.position + (worker.id if worker else 0)
        while True:
            yield self.make(number)
            number += worker.num_workers if worker else 1

    def make(self, number: int) -> T:
        """Batch `number` of this process."""
        return self.drawn(number * self.world + self.rank)

    @abstractmethod
    def drawn(self, number: int) -> T:
        """Batch `number` of the stream that all processes share."""

    def advance(self, batches: int = 1) -> None:
        """Note that batches were used."""
        self.position += batches

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the batches used so far."""
        return {
            "position": self.position,
            "batch": self.batch,
            "seed": self.seed,
            "chips": self.shards.fingerprint,
            "world": self.world,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises DataError when it belongs to other chips, seed or batch size."""
        ours = self.state_dict()
        for name in ("chips", "seed", "batch"):
            if state.get(name) != ours[name]:
                raise DataError(
                    f"the saved position has {name} {state.get(name)!r}, this run {ours[name]!r}",
                    remedy="go on with the same chips and settings, or start a new run",
                )
        if state.get("world", 1) != self.world:
            raise DataError(
                f"the saved position is of {state['world']} processes, this run has {self.world}",
                remedy="go on with as many devices as before",
            )
        self.position = int(state["position"])


class ChipBatches(_Batches[Sample]):
    """Batches of augmented training crops: rgb (B, 3, S, S), target and weight (B, 1, S/2, S/2), shots
    (B, K, 5); see `crops.Sample`.

    Weights hold the date gap and the sensor's floor of the chip.

    Args:
        shards: chips to draw from; crop_px: S, even; augment: None for plain crops;
        bare, tall: shares of the height categories;
        chances: (n,) of each chip, instead of `shards.sampling_weights` with these shares;
        with_shots: give the GEDI shots their weight.
    """

    def __init__(
        self,
        shards: ChipSource,
        batch: int,
        crop_px: int,
        augment: AugmentConfig | None,
        *,
        seed: int = 0,
        bare: float = 0.1,
        tall: float = 0.2,
        chances: np.ndarray | None = None,
        with_shots: bool = True,
    ) -> None:
        super().__init__(shards, batch, seed)
        self.chances = sampling_weights(shards.rows, bare=bare, tall=tall) if chances is None else chances
        self.crop_px, self.augment, self.with_shots = crop_px, augment, with_shots

    def drawn(self, number: int) -> Sample:
        samples = [self._sample(number * self.batch + k) for k in range(self.batch)]
        return Sample(*(torch.stack(parts) for parts in zip(*samples, strict=True)))

    def _sample(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index, 2))
        chip = self.shards[int(rng.choice(len(self.shards), p=self.chances))]
        sample = make_crop(chip, self.crop_px, rng, self.augment)
        if not self.with_shots:
            sample.shots[:, 3] = 0
        return sample


class Views(NamedTuple):
    """Views of B images: wide (B, globals, 3, G, G), near (B, locals, 3, L, L) in 0..1, and masks
    (B * globals, rows, cols) over the patches of the wide views, True = masked."""

    wide: Tensor
    near: Tensor
    masks: Tensor


class ViewBatches(_Batches[Views]):
    """Batches of views for self-supervised pretraining; labels are not looked at.

    Args:
        shards: chips to draw from; batch: images; rules: of the views.
        chances: (n,) of each chip, summing to 1; None draws all alike.
    """

    def __init__(
        self,
        shards: ChipShards,
        batch: int,
        rules: ViewRules | None = None,
        *,
        patch_px: int = 16,
        seed: int = 0,
        chances: np.ndarray | None = None,
    ) -> None:
        super().__init__(shards, batch, seed)
        self.chances = chances
        self.rules, self.patch_px = rules or ViewRules(), patch_px
        if self.rules.global_px % patch_px:
            raise DataError(f"views of {self.rules.global_px} px", expected=f"a multiple of {patch_px}")

    def drawn(self, number: int) -> Views:
        rng = np.random.default_rng((self.seed, number, 1))
        wide, near = [], []
        for _ in range(self.batch):
            chip = self.shards[int(rng.choice(len(self.shards), p=self.chances))]
            seen = chip.rgb.max(axis=0) > 0
            crops = multi_crop(chip.rgb.astype(np.float32) / 255, seen, rng, self.rules)
            wide.append(crops[0])
            near.append(crops[1])
        side = self.rules.global_px // self.patch_px
        masks = batch_masks(self.batch * self.rules.globals_, (side, side), rng)
        return Views(*(torch.from_numpy(x) for x in (np.stack(wide), np.stack(near), masks)))
