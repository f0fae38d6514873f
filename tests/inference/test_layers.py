"""Bands beside heights: they depend on tiles and batches as little as heights do, and mean what they say."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy import ndimage

import canopy
from canopy.calibration.calibrate import crops_described, fit_domain
from canopy.errors import CheckpointError, ConfigError, DataError
from canopy.inference.layers import (
    CARD_KEY,
    DESCRIPTORS,
    DOMAIN,
    EXPOSURE,
    HAZE,
    LOW_SUN,
    SHADOW,
    UNDATED,
    WATER,
    Extras,
    QualityRules,
    descriptor,
    findings,
    rules_of,
    told,
)
from canopy.models.height import fill_invalid
from canopy.models.intervals import IntervalTable


def table() -> IntervalTable:
    """Bands of 1 m + half the height below, twice the relative spread above; twice as wide at 98 %."""
    heights, spread = np.array([0.0, 10.0, 40.0]), np.array([-1.0, 1.0])
    below = 1 + 0.5 * heights[:, None] + 0 * spread
    above = 2 + 0.1 * heights[:, None] + 0.5 * (spread + 1)
    return IntervalTable(
        np.array([0.5, 0.98]), heights, np.array([1.0, 3.0, 3.0]), spread,
        np.stack([below, 2 * below]), np.stack([above, 2 * above]),
    )  # fmt: skip


def rules(limit: float = 1e9) -> QualityRules:
    return QualityRules(np.zeros(DESCRIPTORS), np.ones(DESCRIPTORS), np.eye(DESCRIPTORS), limit)


def test_bands_do_not_depend_on_windows_or_parts(kit) -> None:
    extras = Extras(date=True, interval=table(), level=0.9, quality=rules(30.0))
    names = [name for name, _ in extras.bands]
    assert names == ["canopy_height", "height_lower", "height_upper", "acquisition_date", "quality"]
    grid = kit.utm_grid(40, 70, 130, 150)
    whole, pieces, part = (
        kit.run(area, extras=extras, **options)[1].values
        for area, options in (
            (grid, {"window_px": 1000}),
            (grid, {"window_px": 48, "batch_size": 3, "workers": 3}),
            (grid.window(31, 22, 40, 60), {"window_px": 64}),
        )
    )
    for found, expected in ((pieces, whole), (part, whole[:, 31:71, 22:82])):
        np.testing.assert_allclose(found[:4], expected[:4], atol=2e-4)
        np.testing.assert_array_equal(found[4], expected[4])
    heights, lower, upper = whole[:3]
    np.testing.assert_allclose(heights, kit.run(grid)[0], atol=1e-6)
    assert (lower >= 0).all() and (lower <= heights).all() and (upper >= heights).all()
    assert np.ptp(upper - heights) > 0.05


def test_domain_and_date_bits(kit) -> None:
    grid = kit.utm_grid(0, 0, 40, 40)
    near, far = (
        kit.run(grid, extras=Extras(quality=rules(limit)))[1].values[1].astype(int) for limit in (1e9, 1e-9)
    )
    assert not (near & (DOMAIN | UNDATED)).any() and (far & DOMAIN).all()
    assert (rules().flags(np.zeros((6, 2, 2)), np.zeros((2, 2), int)) == UNDATED).all()


def test_what_a_map_should_be_known_by(kit) -> None:
    grid = kit.utm_grid(0, 0, 60, 60)
    for limit, share in ((1e9, 0.0), (1e-9, 1.0)):
        extras = Extras(judge=rules(limit), tallest_m=15.0)
        heights, _, summary = kit.run(grid, extras=extras)
        found = findings(summary.judged, summary.tall, extras)
        assert found["domain"] == share
        assert found["tall"] == pytest.approx((heights >= 15).mean(), abs=1e-4) != 0
    lines = told(found, extras)
    assert lines[0].startswith("looks unlike the training images in 100 % of the map")
    assert lines[1].startswith("taller than the model can tell in")
    unknown = Extras(judge=QualityRules.without_reference())
    found = findings(kit.run(grid, extras=unknown)[2].judged, math.nan, unknown)
    assert "domain" not in found and "no record of its training images" in told(found, unknown)[-1]


def test_the_default_model_knows_autumn_from_the_summers_it_was_trained_on(shared: Path) -> None:
    """Whole images of places it has not seen, judged as crops of a map are."""
    card = canopy.load_model("default").card
    domain = {}
    for place in ("ky_lockegee", "ky_natbridge"):
        domain[place] = []
        for path in sorted((shared / "data/pairs/rgb").glob(f"{place}_*.tif")):
            with rasterio.open(path) as file:
                rgb = file.read().astype(np.float32) / 255
            valid = rgb.any(axis=0)  # one tile ends at the edge of its flight
            judged = rules_of(card)(fill_invalid(rgb, valid), valid)
            domain[place].append(judged["domain"] / judged["judged"])
    assert domain == {"ky_lockegee": [1, 1, 1, 1], "ky_natbridge": [0, 0, 0, 0]}


# ---- flags ------------------------------------------------------------------------------------
def bits_of(rgb: np.ndarray, rule: QualityRules | None = None) -> np.ndarray:
    rule = rule or rules()
    scores = rule.scores(rgb.astype(np.float32), np.ones(rgb.shape[1:], bool))
    return rule.flags(scores, np.ones(rgb.shape[1:], int))


def forest(side: int = 192) -> np.ndarray:
    crowns = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(side, side)), 3)
    shade = 1 + 0.35 * crowns / crowns.std()
    return np.clip(np.array([0.28, 0.36, 0.22])[:, None, None] * np.clip(shade, 0.6, 1.6), 0.02, 1)


def test_scenes_made_to_trip_a_flag_trip_it_and_plain_forest_trips_nothing() -> None:
    assert ((bits_of(forest()) | SHADOW) == SHADOW).mean() > 0.99
    picture = forest()
    picture[:, 40:80, 40:80] *= 0.3
    bits = bits_of(picture)
    assert (bits[45:75, 45:75] & SHADOW).mean() > 0.9 and not (bits[120:, 120:] & SHADOW).any()
    cloud = forest()
    cloud[:, :90] = 0.25 * cloud[:, :90] + 0.65
    bits = bits_of(cloud)
    assert (bits[10:70] & HAZE).mean() > 0.9 and not (bits[110:] & HAZE).any()
    bright = forest()
    bright[:, 100:150, 100:150] = 1.0
    assert (bits_of(bright)[105:145, 105:145] & EXPOSURE).all()
    assert (bits_of(np.broadcast_to(np.array([0.06, 0.1, 0.13])[:, None, None], (3, 96, 96))) & WATER).all()
    dark = np.where((np.arange(192) % 96 < 44)[None, :, None], 0.25, 1.0) * forest()
    assert (bits_of(dark) & LOW_SUN).all()  # a matter of the surroundings


def test_descriptor_has_its_size_whatever_the_image() -> None:
    for shape in ((3, 64, 64), (3, 100, 230), (3, 30, 40)):
        assert descriptor(np.full(shape, 0.4, np.float32)).shape == (DESCRIPTORS,)
    assert np.isfinite(descriptor(np.zeros((3, 64, 64), np.float32))).all()


def test_faults() -> None:
    with pytest.raises(ConfigError, match="canopy calibrate interval"):
        rules_of({})
    with pytest.raises(CheckpointError, match="cannot be used"):
        rules_of({CARD_KEY: {"centre": [0.0], "scale": [1.0], "root": [[1.0]], "limit": 1}})
    with pytest.raises(DataError, match="describe no domain"):
        fit_domain([], [])


def test_towns_and_deserts_are_out_of_domain_and_held_out_forest_is_not(shared: Path) -> None:
    """Reference of training tiles, limit of val tiles: a third of each, to be quick."""

    def read(path: Path) -> np.ndarray:
        with rasterio.open(path) as file:
            return file.read()

    with (shared / "data" / "manifest.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["kind"] != "neon"]
    images = {
        split: [
            read(shared / "data" / r["rgb_path"]) for r in [r for r in rows if r["split"] == split][::step]
        ]
        for split, step in (("train", 4), ("val", 2))
    }
    domain = rules_of({CARD_KEY: fit_domain(images["train"], images["val"])})

    def flagged(image: np.ndarray) -> bool:
        """Whether an image is out of domain, on the mean of its crops."""
        return float(np.mean([domain.distance(d) for d in crops_described(image)])) > domain.limit

    towns = sorted((shared / "data" / "ssl" / "naip_ca").glob("*.tif"))[::35]
    out = [flagged(ndimage.zoom(read(path), (1, 1.2, 1.2), order=1)) for path in towns]
    assert np.mean(out) > 0.9  # 98 % on the full reference, see docs/uncertainty.md
    held_out = [flagged(read(p)) for p in (shared / "data/pairs/rgb").glob("ky_natbridge*.tif")]
    assert held_out and not any(held_out)
    noise = np.random.default_rng(0).normal(size=(2, 320, 320))
    broad, fine = (ndimage.gaussian_filter(n, s, mode="wrap") for n, s in zip(noise, (30, 8), strict=True))
    dunes = np.sin((np.arange(320) + 20 * broad / broad.std()) / 12)
    sand = np.array([0.72, 0.58, 0.42])[:, None, None] * (1 + 0.02 * fine / fine.std() + 0.03 * dunes)
    assert flagged(np.round(sand * 255).astype(np.uint8)) and (bits_of(sand, domain) & DOMAIN).all()
