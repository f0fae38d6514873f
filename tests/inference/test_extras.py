"""Bands beside heights: they depend on tiles and batches as little as heights do, and mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canopy.inference.engine import predict_grid
from canopy.inference.layers import DESCRIPTORS, DOMAIN, UNDATED, Extras, QualityRules
from canopy.models.heads import IntervalTable


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


@pytest.fixture
def spread_model(kit):
    class SpreadModel(kit.AnalyticModel):
        def layers(self, rgb: torch.Tensor, outputs: tuple[str, ...]) -> torch.Tensor:
            made = {"height_m": self.forward(rgb), "spread_m": 0.5 + rgb[:, :1]}
            return torch.cat([made[name] for name in outputs], dim=1)

    return SpreadModel()


def run(kit, model, grid, extras: Extras, **options):
    sink = kit.Recorder(grid, len(extras.bands))
    predict_grid(model, kit.FieldSource(), grid, sink, extras=extras, **options)
    return sink.values


def test_bands_do_not_depend_on_windows_or_parts(kit, spread_model) -> None:
    extras = Extras(date=True, interval=table(), level=0.9, quality=rules(30.0))
    grid = kit.utm_grid(40, 70, 130, 150)
    whole = run(kit, spread_model, grid, extras, window_px=1000)
    pieces = run(kit, spread_model, grid, extras, window_px=48, batch_size=3, workers=3)
    np.testing.assert_allclose(pieces[:4], whole[:4], atol=2e-4)
    np.testing.assert_array_equal(pieces[4], whole[4])
    part = run(kit, spread_model, grid.window(31, 22, 40, 60), extras, window_px=64)
    np.testing.assert_allclose(part[:4], whole[:4, 31:71, 22:82], atol=2e-4)
    np.testing.assert_array_equal(part[4], whole[4, 31:71, 22:82])


def test_bounds_enclose_heights_and_heights_stay_as_they_were(kit, spread_model) -> None:
    grid = kit.utm_grid(0, 0, 90, 90)
    plain = run(kit, spread_model, grid, Extras())
    heights, lower, upper = run(kit, spread_model, grid, Extras(interval=table(), level=0.9))
    np.testing.assert_allclose(heights, plain[0], atol=1e-6)
    assert (lower >= 0).all() and (lower <= heights).all() and (upper >= heights).all()
    assert np.ptp(upper - heights) > 0.05


def test_order_of_bands() -> None:
    names = [name for name, _ in Extras(date=True, interval=table(), quality=rules()).bands]
    assert names == ["canopy_height", "height_lower", "height_upper", "acquisition_date", "quality"]
    assert [n for n, _ in Extras(date=True).bands] == ["canopy_height", "acquisition_date"]


def test_domain_and_date_bits(kit, spread_model) -> None:
    grid = kit.utm_grid(0, 0, 40, 40)
    near = run(kit, spread_model, grid, Extras(quality=rules(1e9)))[1].astype(int)
    far = run(kit, spread_model, grid, Extras(quality=rules(1e-9)))[1].astype(int)
    assert not (near & DOMAIN).any() and (far & DOMAIN).all()
    assert not (near & UNDATED).any()
    assert (rules().flags(np.zeros((6, 2, 2)), np.zeros((2, 2), int)) == UNDATED).all()
