"""`--radiometry`: the colours of the imagery moved onto those of the model's training images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import output_crs
from canopy.models.height import V1_AERIAL, Stretch, fill_invalid, parse_radiometry

if TYPE_CHECKING:
    from canopy.imagery.base import ImagerySource
    from canopy.models.height import HeightModel

# A lattice of small windows at the model's scale: what the network sees, a million pixels at most.
_WINDOWS, _WINDOW_PX = 8, 128
_DIGITS = 5  # what the tags record, so that the recorded numbers reproduce the map


def with_radiometry(
    model: HeightModel, source: ImagerySource, requested: AOI, wish: str
) -> tuple[HeightModel, str, list[str]]:
    """The model with the stretch that `--radiometry` asks for.

    The percentiles are those of all of the source, whatever part of it is mapped, so that a pixel's height
    does not depend on how the area is cut. Only where a source has no extent of its own (web tiles, searches)
    are they those of the requested area; a note then gives the numbers that fix them for other areas.

    Returns:
        The model (its weights shared), the stretch for the tags or `none`, and notes for the user.

    Raises:
        ConfigError: `wish` cannot be read.
        InputError: a model without stored percentiles, or imagery without pixels or contrast.
    """
    parsed = parse_radiometry(wish)
    if parsed is None:
        return model, "none", []
    whole = source.area() if source.has_own_extent else None
    measured, target = parsed[0], parsed[1] or model.config.percentiles
    if wish == V1_AERIAL:
        target = aerial_percentiles(model, source, whole or requested)
    if not target:
        raise InputError(
            "this model's file has no percentiles to match",
            where=f"--radiometry {wish}",
            remedy="give the six target percentiles r5,r95,g5,g95,b5,b95",
        )
    notes: list[str] = []
    if measured is None:
        measured = scene_percentiles(source, whole or requested, model.config.gsd_m)
        if whole is None:
            numbers = ",".join(f"{v:g}" for v in (*measured, *target))
            notes.append(
                "the imagery has no extent of its own, so its percentiles were measured over this area; "
                f"for neighbouring areas use --radiometry {numbers}"
            )
    stretch = Stretch(measured, tuple(target))
    return model.with_radiometry(stretch), stretch.describe(), notes


def scene_percentiles(source: ImagerySource, area: AOI, gsd_m: float) -> tuple[float, ...]:
    """5th and 95th percentile of each band over `area`: r5, r95, g5, g95, b5, b95, in 0..1.

    Measured on a regular lattice of windows at `gsd_m`; the same numbers every time.

    Raises:
        ImageryError: no valid pixel there.
    """
    pixels = [rgb[:, valid] for rgb, valid in _windows(source, area, gsd_m, _WINDOW_PX)]
    values = np.concatenate(pixels, axis=1)
    if values.shape[1] == 0:
        raise ImageryError("no valid pixel to measure its colours on", where=source.name)
    measured = np.percentile(values.astype(np.float64), (5, 95), axis=1).T.ravel()
    return tuple(float(f"{v:.{_DIGITS}g}") for v in measured)


def aerial_percentiles(model: HeightModel, source: ImagerySource, area: AOI) -> tuple[float, ...]:
    """What v1's network says that a satellite's percentiles would be over `area`, as `scene_percentiles`.

    Its authors ask it crop by crop, and heights depend on the crops; here it is asked on a regular lattice of
    crops, and the mean counts for all of the scene. On a scene of one crop the two are the same.

    Raises:
        InputError: the model is no v1. ImageryError: no valid pixel there. FetchError: it cannot be fetched.
    """
    import torch

    from canopy.models.aerial import CROP_PX, load_percentile_net
    from canopy.models.registry import aerial_network

    if not str(model.card.get("name", "")).startswith("v1-"):
        raise InputError(
            "the aerial normalisation of v1 is made for v1's models", where=f"--radiometry {V1_AERIAL}",
            remedy="use --radiometry match",
        )  # fmt: skip
    net, total, weight = load_percentile_net(aerial_network()), np.zeros(6), 0.0
    for rgb, valid in _windows(source, area, model.config.gsd_m, CROP_PX):
        crop, seen = np.zeros((3, CROP_PX, CROP_PX), np.float32), np.zeros((CROP_PX, CROP_PX), bool)
        height, width = valid.shape  # less than a crop on a small scene, which is then mirrored
        crop[:, :height, :width], seen[:height, :width] = rgb, valid
        if share := float(seen.mean()):
            with torch.no_grad():
                total += share * net(torch.from_numpy(fill_invalid(crop, seen))[None])[0].double().numpy()
            weight += share
    if not weight:
        raise ImageryError("no valid pixel to measure its colours on", where=source.name)
    return tuple(float(f"{v:.{_DIGITS}g}") for v in np.clip(total / weight, 0, 1))


def _windows(
    source: ImagerySource, area: AOI, gsd_m: float, side_px: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Colours (3, h, w) and validity (h, w) of windows spread evenly over an area, never overlapping."""
    grid = area.grid(output_crs(area.lonlat, source.native_crs), gsd_m)

    def starts(length: int) -> list[int]:
        count = max(1, min(_WINDOWS, length // side_px))
        return [int(start) for start in np.linspace(0, max(0, length - side_px), count)]

    for row, col in itertools.product(starts(grid.height), starts(grid.width)):
        height, width = min(side_px, grid.height - row), min(side_px, grid.width - col)
        imagery = source.read(grid.window(row, col, height, width))
        # Pure black is a collar that nobody declared far more often than it is a colour.
        valid = imagery.valid & np.isfinite(imagery.rgb).all(axis=0) & imagery.rgb.any(axis=0)
        yield imagery.rgb, valid
