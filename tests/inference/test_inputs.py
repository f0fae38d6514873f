"""`--radiometry`: how a scene is measured, and heights that do not depend on the cut; coarse imagery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

import canopy
from canopy.errors import ConfigError, InputError
from canopy.geo.area import AOI
from canopy.inference.inputs import scale_notes, scene_percentiles, with_radiometry
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel, Stretch, parse_radiometry

TARGET = (0.1, 0.7, 0.15, 0.65, 0.05, 0.55)


def _model(percentiles: tuple[float, ...] = TARGET) -> HeightModel:
    torch.manual_seed(0)
    encoder = EncoderConfig(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3))
    decoder = DecoderConfig(post_channels=(8, 8, 8, 8), fusion=8, hidden=8, bins=16)
    return HeightModel(
        ModelConfig(crop_px=64, percentiles=percentiles, encoder=encoder, decoder=decoder)
    ).eval()


@pytest.fixture(params=[0, None], ids=["nodata declared", "black collar undeclared"])
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A dark, bluish aerial image, brighter in the east, with a black corner that is not part of it."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 120, 300)[None, None, :] * np.array([0.7, 1.0, 1.3])[:, None, None]
    values = np.clip(ramp + rng.normal(0, 12, (3, 260, 300)), 1, 255).astype(np.uint8)
    values[:, :60, :60] = 0
    path = tmp_path / "aerial.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=300, height=260, count=3, dtype="uint8", nodata=request.param,
        crs="EPSG:32617", transform=Affine(0.5, 0, 310_000, 0, -0.5, 4_170_000), photometric="RGB",
    ) as out:  # fmt: skip
        out.write(values)
    return path


def test_what_the_option_takes() -> None:
    assert parse_radiometry("none") is None
    assert parse_radiometry("match") == (None, None)
    assert parse_radiometry("0.1,0.7,.15,.65,.05,.55") == (None, TARGET)
    assert parse_radiometry("0,1,0,1,0,1,0.1,0.7,.15,.65,.05,.55") == ((0, 1, 0, 1, 0, 1), TARGET)
    for wrong in ("Match", "1,2", "0.1,0.7,0.1,0.7,0.1,7", "0.7,0.1,0.1,0.7,0.1,0.7", "a,b,c,d,e,f"):
        with pytest.raises(ConfigError):
            parse_radiometry(wrong)
    factor, offset = map(np.array, Stretch((0.1, 0.6, 0.1, 0.5, 0.1, 0.4), TARGET).factors())
    np.testing.assert_allclose(factor * (0.1, 0.1, 0.1) + offset, TARGET[::2])
    np.testing.assert_allclose(factor * (0.6, 0.5, 0.4) + offset, TARGET[1::2])


def test_the_scene_is_measured_without_its_nodata(scene: Path) -> None:
    source = canopy.open_imagery(scene)
    area = source.area()
    assert area is not None
    measured = scene_percentiles(source, area, 0.5)
    with rasterio.open(scene) as image:
        values = image.read().astype(float)
    wanted = np.percentile(values[:, values.any(axis=0)] / 255, (5, 95), axis=1).T.ravel()
    assert np.allclose(measured, wanted, atol=0.03)  # windows, not every pixel
    assert scene_percentiles(source, area, 0.5) == measured


def test_a_height_does_not_depend_on_the_part_that_is_mapped(scene: Path, tmp_path: Path) -> None:
    model = _model()
    whole = canopy.predict(scene, model=model, out=tmp_path / "whole.tif", radiometry="match", device="cpu")
    part = canopy.predict(
        scene, model=model, out=tmp_path / "part.tif", radiometry="match", device="cpu",
        bounds=(310_080, 4_169_890, 310_140, 4_169_960), bounds_crs="EPSG:32617",
    )  # fmt: skip
    with rasterio.open(whole) as a, rasterio.open(part) as b:
        assert a.tags()["CANOPY_RADIOMETRY"] == b.tags()["CANOPY_RADIOMETRY"]
        window = rasterio.windows.from_bounds(*b.bounds, transform=a.transform)
        assert np.array_equal(a.read(1, window=window), b.read(1), equal_nan=True)
        recorded = a.tags()["CANOPY_RADIOMETRY"].replace(" -> ", ",")
        heights = a.read(1)
    # The tag's own numbers, given back, make the same map; without a stretch it is another.
    again = canopy.predict(scene, model=model, radiometry=recorded, device="cpu")
    assert np.array_equal(again.values, heights, equal_nan=True)
    plain = canopy.predict(scene, model=model, device="cpu")
    assert np.nanmax(np.abs(plain.values - heights)) > 1e-3
    assert "CANOPY_RADIOMETRY" not in plain.attrs and model.stretch is None


def test_a_model_without_percentiles_needs_them_said(scene: Path) -> None:
    source = canopy.open_imagery(scene)
    whole = source.area()
    assert whole is not None
    with pytest.raises(InputError, match="no percentiles"):
        with_radiometry(_model(()), source, whole, "match")
    _, text, notes = with_radiometry(_model(()), source, whole, ",".join(map(str, TARGET)))
    assert text.endswith("-> 0.1,0.7,0.15,0.65,0.05,0.55") and notes == []


def test_a_search_has_no_extent_of_its_own(scene: Path) -> None:
    """What was found for one area is measured over that area, and the note says how to keep the numbers."""
    source = canopy.open_imagery(scene)
    whole, east = source.area(), AOI.from_bounds((310_100, 4_169_880, 310_140, 4_169_990), "EPSG:32617")
    assert whole is not None and source.has_own_extent
    _, fixed, none = with_radiometry(_model(), source, east, "match")
    source.has_own_extent = False  # as `open_stac` has it
    _, measured, notes = with_radiometry(_model(), source, east, "match")
    assert measured != fixed and not none and "--radiometry" in notes[0]
    assert with_radiometry(_model(), source, whole, "match")[1] == fixed


def test_a_flat_image_has_nothing_to_stretch(scene: Path) -> None:
    with rasterio.open(scene, "r+") as image:
        image.write(np.full((3, image.height, image.width), 90, np.uint8))
    with pytest.raises(ConfigError, match="no contrast"):
        canopy.predict(scene, model=_model(), radiometry="match", device="cpu")


def test_coarse_imagery_is_warned_of() -> None:
    assert scale_notes(0.6, 0.5) == []
    assert "less certain" in scale_notes(1.0, 0.5)[0]
    assert "mean nothing" in scale_notes(10.0, 0.5)[0]
