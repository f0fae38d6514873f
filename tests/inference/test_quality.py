"""Quality scores on scenes made to trip them, and on real imagery of towns and forests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from canopy.calibration.apply import crops_described, fit_domain
from canopy.errors import CheckpointError, ConfigError, DataError
from canopy.inference.layers import (
    BITS,
    CARD_KEY,
    DESCRIPTORS,
    DOMAIN,
    EXPOSURE,
    HAZE,
    LOW_SUN,
    SHADOW,
    WATER,
    QualityRules,
    descriptor,
    rules_of,
)


def bits_of(rgb: np.ndarray, rules: QualityRules | None = None) -> np.ndarray:
    rules = rules or QualityRules(np.zeros(DESCRIPTORS), np.ones(DESCRIPTORS), np.eye(DESCRIPTORS), 1e9)
    scores = rules.scores(rgb.astype(np.float32), np.ones(rgb.shape[1:], bool))
    return rules.flags(scores, np.ones(rgb.shape[1:], int))


def forest(seed: int = 0, side: int = 192) -> np.ndarray:
    rng = np.random.default_rng(seed)
    crowns = ndimage.gaussian_filter(rng.normal(size=(side, side)), 3)
    shade = 1 + 0.35 * crowns / crowns.std()
    return np.clip(np.array([0.28, 0.36, 0.22])[:, None, None] * np.clip(shade, 0.6, 1.6), 0.02, 1)


def smooth(rng: np.random.Generator, side: int, sigma: float) -> np.ndarray:
    made = ndimage.gaussian_filter(rng.normal(size=(side, side)), sigma, mode="wrap")
    return made / made.std()


def desert(seed: int, side: int = 320) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = np.array([0.72, 0.58, 0.42]) * rng.uniform(0.8, 1.15)
    ground = 1 + 0.05 * smooth(rng, side, 40) + rng.uniform(0.01, 0.04) * smooth(rng, side, 8)
    dunes = np.sin((np.arange(side) + 20 * smooth(rng, side, 30)) / rng.uniform(6, 25))
    return np.clip(base[:, None, None] * (ground + rng.uniform(0, 0.05) * dunes), 0, 1)


def water(seed: int, side: int = 320) -> np.ndarray:
    rng = np.random.default_rng(seed)
    colours = [[0.10, 0.17, 0.22], [0.06, 0.10, 0.13], [0.15, 0.25, 0.25], [0.25, 0.30, 0.28]]
    base = np.array(colours[rng.integers(4)]) * rng.uniform(0.8, 1.2)
    waves = 1 + 0.05 * smooth(rng, side, 60) + rng.uniform(0.01, 0.06) * smooth(rng, side, 1.5)
    return np.clip(base[:, None, None] * waves, 0, 1)


def test_plain_forest_trips_nothing() -> None:
    assert ((bits_of(forest()) | SHADOW) == SHADOW).mean() > 0.99


def test_shadow_haze_exposure_and_water() -> None:
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


def test_low_sun_is_a_matter_of_the_surroundings() -> None:
    dark = np.where((np.arange(192) % 96 < 44)[None, :, None], 0.25, 1.0) * forest()
    assert (bits_of(dark) & LOW_SUN).all()
    assert not (bits_of(forest()) & LOW_SUN).any()


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
    assert len(BITS) == 7


@pytest.fixture(scope="module")
def domain(shared) -> QualityRules:
    """Reference of training tiles, limit of val tiles: a third of each, to be quick."""
    import csv

    import rasterio

    with (shared / "data" / "manifest.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["kind"] != "neon"]
    images: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for split, step in (("train", 4), ("val", 2)):
        for row in [r for r in rows if r["split"] == split][::step]:
            with rasterio.open(shared / "data" / row["rgb_path"]) as file:
                images[split].append(file.read())
    return rules_of({CARD_KEY: fit_domain(images["train"], images["val"])})


def flagged(rules: QualityRules, image: np.ndarray) -> bool:
    """Whether an image (uint8 or 0..1) is out of domain, on the mean of its crops."""
    whole = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
    return float(np.mean([rules.distance(d) for d in crops_described(whole)])) > rules.limit


def test_towns_deserts_and_water_are_out_of_domain(domain: QualityRules, shared) -> None:
    import rasterio

    towns = []
    for path in sorted((shared / "data" / "ssl" / "naip_ca").glob("*.tif"))[::35]:
        with rasterio.open(path) as file:
            towns.append(flagged(domain, ndimage.zoom(file.read(), (1, 1.2, 1.2), order=1)))
    assert np.mean(towns) > 0.9  # 98 % on the full reference, see docs/uncertainty.md
    assert all(flagged(domain, desert(seed)) for seed in range(8))
    assert all(flagged(domain, water(seed)) for seed in range(8))


def test_held_out_forest_is_not(domain: QualityRules, shared) -> None:
    import rasterio

    found = []
    for path in sorted((shared / "data" / "pairs" / "rgb").glob("ky_natbridge*.tif")):
        with rasterio.open(path) as file:
            found.append(flagged(domain, file.read()))
    assert found and not any(found)


def test_the_flag_is_what_the_scores_say(domain: QualityRules) -> None:
    bits = bits_of(desert(0), domain)
    assert (bits & DOMAIN).all()
