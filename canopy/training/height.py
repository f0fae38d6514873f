"""Supervised height training as a LightningModule, and scores of heights on chips, per site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from canopy import metrics
from canopy.chips.augment import Sample
from canopy.chips.data import ChipDataModule
from canopy.chips.store import Chip, ChipRow, predict_chip
from canopy.models.decoder import bin_weights
from canopy.models.height import HeightModel
from canopy.runtime import log
from canopy.training import losses
from canopy.training.optim import (
    TrainingModule,
    layer_factor,
    learning_rate,
    mean_of_processes,
    parameter_groups,
    sum_of_processes,
)
from canopy.training.settings import FinetuneSettings, weight_at

_LAST_RATE = 0.01  # the learning rate at the end, as a share of its peak
VAL_MAE = "val_mae_m"  # what chooses between validations
_OF_SITES = ("mae_m", "r", "bias_m")
_ROW = ("n", "mae_m", "rmse_m", "r", "bias_m", "r2", "block_r2", "edge_error")
Table = dict[str, dict[str, float]]
T = TypeVar("T")


class Output(NamedTuple):
    """What a model says about a batch, on the label grid: heights (B, 1, h, w) in metres, bin scores."""

    height_m: Tensor
    scores: Tensor


class HeightModule(TrainingModule):
    """Trains `model` on `Sample`s; validates on whole chips of a `ChipDataModule`.

    Of several processes each has its own part of every batch and of every validation; gradients, logged
    values and scores are those of all, so that all hold the same weights and take the same steps.

    Args:
        model: to train.
        settings: of the run.
    """

    def __init__(self, model: HeightModel, settings: FinetuneSettings) -> None:
        super().__init__(settings.seed)
        self.model, self.settings = model, settings
        model.train()
        if settings.freeze_encoder:
            model.encoder.requires_grad_(False).eval()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        s = self.settings

        def factor(name: str) -> float:
            return layer_factor(name, s.architecture.encoder.depth, s.layer_decay)

        groups = parameter_groups(self.model.named_parameters(), factor)
        return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.99), weight_decay=0.0)

    def rates(self) -> tuple[float, float]:
        s = self.settings
        rate = learning_rate(self.progress, s.lr, _LAST_RATE * s.lr, s.warmup)
        return rate, s.weight_decay

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        terms, mae = self.terms(Sample(*batch))
        total = torch.stack(list(terms.values())).sum()
        self.losses = {name: mean_of_processes(x.detach()) for name, x in {"loss": total, **terms}.items()}
        self.log_dict(self.losses | {"mae_m": mean_of_processes(mae)})
        self.log_dict({"lr": self.rates()[0], "progress": self.progress, "step": self.global_step + 1.0})
        return total

    def output(self, rgb: Tensor) -> Output:
        """Predict rgb (B, 3, S, S) on the label grid (B, 1, S/2, S/2), whose pixels have twice the side."""
        height, _, scores = self.model.heights_and_scores(rgb.contiguous(memory_format=torch.channels_last))
        return Output(functional.avg_pool2d(height.float(), 2), scores.float())

    def terms(self, batch: Sample) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted loss terms by name, and the batch's plain MAE in metres.

        Terms that never count are left out; those of a ramp are 0 while it is: a log has them all from its
        first line.
        """
        s, (pred, scores) = self.settings.loss, self.output(batch.rgb)
        target, weight = batch.target, batch.weight
        if s.shift_reach_m and self.progress >= s.shift_after:
            side_m = 2 * self.model.config.gsd_m  # of a label pixel
            reach = round(s.shift_reach_m / side_m)
            shifts = losses.best_shift(pred, target, weight, reach, s.shift_penalty_m * side_m)
            target, weight = losses.align_labels(target, weight, shifts)
        mae = losses.weighted_mean((pred - target).abs().detach(), weight)
        weight = weight * losses.height_factor(target, s.height_weight)
        centres = self.model.centres * self.model.config.decoder.scale
        by_name: dict[str, Callable[[], Tensor]] = {
            "charbonnier": lambda: losses.charbonnier(pred, target, weight),
            "silog": lambda: losses.silog(pred, target, weight),
            "gradient": lambda: losses.gradient_loss(pred, target, weight),
            "two_hot": lambda: losses.two_hot_loss(
                self._bins(scores, pred).clamp_min(1e-9).log(), target, weight, centres
            ),
            "ranked": lambda: losses.ranked_loss(self._bins(scores, pred), target, weight, centres),
            "footprint": lambda: losses.footprint_loss(
                pred,
                batch.shots,
                top=s.footprint_top,
                reach_m=s.footprint_reach_m,
                penalty=s.footprint_penalty,
            ),
        }
        wanted = {name: weight_at(getattr(s, name), self.progress) for name in by_name if getattr(s, name)}
        return {name: w * by_name[name]() if w else pred.sum() * 0.0 for name, w in wanted.items()}, mae

    def _bins(self, scores: Tensor, like: Tensor) -> Tensor:
        """Bin weights (B, bins, h, w) on the label grid."""
        weights = bin_weights(scores, self.model.config.decoder)
        if weights.shape[-2:] != like.shape[-2:]:
            weights = functional.interpolate(weights, size=like.shape[-2:], mode="area")
        return weights

    # ---- validation: whole chips, by number --------------------------------------------------------------
    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(len(self._data.val), len(metrics.FIELDS), dtype=torch.float64)

    def validation_step(self, number: int, batch_idx: int) -> None:
        number = int(number)
        if number >= 0:  # below: another process has the last of them
            chip = self._data.val[number]
            heights = heights_of(self.model, chip, self.settings.crop_px, 0)
            self._sums[number] = torch.from_numpy(chip_sums(heights, chip))

    def on_validation_epoch_end(self) -> None:
        # Each chip has a row of its own: any number of processes gives the same bits.
        sums = sum_of_processes(self._sums, self.device).numpy()
        table = table_of(zip(self._data.val.rows, sums, strict=True))
        best = headline(table)
        for site, row in table.items():
            self.log_dict({f"val/{site}/{k}": v for k, v in row.items() if k in _OF_SITES})
        self.log_dict({f"val_{k}": float(v) for k, v in best.items()} | {"step": float(self.global_step)})
        if self.trainer.is_global_zero:
            seen = "seen" if self._data.chosen.val_seen else "val"
            said = best["mae_m"], best["r"], best["bias_m"]
            log.info("step %d, %s MAE %.2f m, r %.2f, bias %+.2f m", self.global_step, seen, *said)

    @property
    def _data(self) -> ChipDataModule:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ChipDataModule)
        return data


# ---- scores on chips ---------------------------------------------------------------------------------
def score_chips(
    model: HeightModel, chips: Iterable[Chip], *, crop_px: int | None = None, overlap_px: int = 64
) -> Table:
    """Table of site -> scores at 1 m; see `table_of`."""
    side = crop_px or model.config.crop_px
    return score(chips, lambda chip: heights_of(model, chip, side, overlap_px))


@torch.inference_mode()
def heights_of(model: HeightModel, chip: Chip, crop_px: int, overlap_px: int, batch: int = 4) -> np.ndarray:
    """Heights (h, w) in metres at 1 m, from crops of the chip's image with a linear cross-fade.

    Each crop sees invalid pixels filled from itself alone, as in a map.
    """

    def network(crops: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(crops).to(model.mean.device).contiguous(memory_format=torch.channels_last)
        return model(inputs).float().cpu().numpy()

    return predict_chip(network, chip, crop_px, overlap_px, batch)[0]


def score(chips: Iterable[Chip], predictor: Callable[[Chip], np.ndarray]) -> Table:
    """Scores of any `predictor` (chip -> heights (h, w) at 1 m); see `table_of`."""
    return table_of((chip.row, chip_sums(predictor(chip), chip)) for chip in chips)


def table_of(sums: Iterable[tuple[ChipRow, np.ndarray]]) -> Table:
    """Scores from the rows and `chip_sums` of chips.

    Returns:
        One row per site in order of appearance, then 'all but plots', 'plots' (where there are any) and
        'all', each over its pooled pixels; empty where there are no chips. A row has n, mae_m, rmse_m, r,
        bias_m, r2, block_r2, edge_error (see `canopy.metrics`; blocks and gradients within chips) and
        bias_LOW-HIGH_m, the bias of pixels by their measured height.
    """
    sites: dict[str, np.ndarray] = {}
    groups = {name: np.zeros(len(metrics.FIELDS)) for name in ("all but plots", "plots", "all")}
    for row, found in sums:
        sites[row.site] = sites.get(row.site, 0) + found
        groups["plots" if row.kind == "neon" else "all but plots"] += found
        groups["all"] += found
    kept = {name: total for name, total in groups.items() if total[metrics.COLUMN["n"]]}
    return {name: _row(total) for name, total in {**sites, **kept}.items()}


def chip_sums(pred: np.ndarray, chip: Chip) -> np.ndarray:
    """Sums (len(metrics.FIELDS),) over the pixels of a chip that are `scored`; those of chips add up."""
    known, truth = chip.scored, chip.chm_m
    h, w = known.shape
    one = np.zeros(int(known.sum()), np.int64)
    sums = metrics.pixel_sums(pred[known], truth[known], one, 1)
    side = metrics.BLOCK_PX
    block = (np.arange(h) // side)[:, None] * -(-w // side) + np.arange(w) // side
    blocks = np.zeros(int(block.max(initial=-1)) + 1, np.int64)
    sums += metrics.block_sums(pred[known], truth[known], block[known], blocks, 1)
    if min(h, w) > 2:
        inner = np.zeros((h - 2, w - 2), np.int64)
        sums += metrics.gradient_sums(metrics.gradients(pred, truth, known), inner, 1)
    return sums[0]


def headline(table: Mapping[str, dict[str, T]]) -> dict[str, T]:
    """The row that chooses between models: all but plots, or all where there are only plots."""
    return table.get("all but plots") or table["all"]


def _row(sums: np.ndarray) -> dict[str, float]:
    every = metrics.scores(sums)
    row = {name: float(every[name]) for name in _ROW}
    for name, part in zip(metrics.BIN_NAMES, metrics.bin_scores(sums), strict=True):
        row[f"bias_{name}_m"] = float(part["bias_m"])
    return row | {"n": int(row["n"])}


def plain(table: Table) -> dict[str, dict[str, float | None]]:
    """Rounded to the millimetre, NaN to None, so that JSON stays JSON."""
    return {
        site: {k: None if math.isnan(v) else round(v, 3) for k, v in row.items()}
        for site, row in table.items()
    }
