"""`--radiometry`: how a scene is measured, and heights that do not depend on the cut; coarse imagery."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F  # noqa: N812
from affine import Affine

import canopy
from canopy.errors import CheckpointError, ConfigError, InputError
from canopy.geo.area import AOI
from canopy.inference.inputs import scale_notes
from canopy.inference.radiometry import scene_percentiles, with_radiometry
from canopy.models.aerial import load_percentile_net
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel, Stretch, parse_radiometry
from canopy.models.registry import aerial_network
from canopy.runtime import bundled_dir

TARGET = (0.1, 0.7, 0.15, 0.65, 0.05, 0.55)


def test_the_source_that_is_chosen_is_said_with_the_reason(caplog):
    from canopy.inference.inputs import _best_for

    caplog.set_level("INFO")
    assert _best_for(AOI.from_bbox([37.85, -84.26], size_m=500)) == "naip"
    assert "naip (NAIP aerial" in caplog.text and "public domain, leaf-on, 0.6 m; by licence" in caplog.text
    assert "before kyfromabove" in caplog.text
    assert _best_for(AOI.from_bbox([48.4, 2.7], size_m=500)) == "ign-ortho"
    assert "ign-ortho (IGN BD ORTHO" in caplog.text
    with pytest.raises(InputError, match="no named source covers the area"):
        _best_for(AOI.from_bbox([0.0, -30.0], size_m=500))
    with pytest.raises(InputError, match="--bbox takes LAT,LON, --bounds takes W,S,E,N"):
        _best_for(AOI.from_bbox([-71.296, 44.083], size_m=500))  # New Hampshire, in the other order


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


# ---- v1's own normalisation ------------------------------------------------------------------------
WIDTHS = (3, 8, 16, 32, 64, 64, 128)
BLOCKS = ("input_layer", *(f"conv_block{i}" for i in range(1, 6)))


def published_state() -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of the published percentile network."""
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        fan = math.prod(shape[1:])
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.randn(*shape) * fan**-0.5,
            torch.randn(shape[0]) / 9,
        )

    for name, into, out in zip(BLOCKS, WIDTHS, WIDTHS[1:], strict=False):
        layer(f"{name}.0", out, into, 1, 1)
        state |= {f"{name}.1.weight": torch.rand(out) + 0.5, f"{name}.1.bias": torch.randn(out) / 9}
        state |= {
            f"{name}.1.running_mean": torch.randn(out) / 9,
            f"{name}.1.running_var": torch.rand(out) + 0.5,
        }
        state[f"{name}.1.num_batches_tracked"] = torch.tensor(7)
        layer(f"{name}.3", out, out, 3, 3)
    for name, into, out in (("fc1.0", 8192, 64), ("fc2.0", 64, 64), ("fc3.0", 64, 32), ("fc4", 32, 6)):
        layer(name, out, into)
    state["fc4.weight"] *= 0.02
    state["fc4.bias"] = torch.tensor([0.11, 0.16, 0.07, 0.71, 0.66, 0.53])  # three 5th, then three 95th
    return {f"backbone.{name}": tensor for name, tensor in state.items()}


def published_way(image: np.ndarray, state: dict[str, torch.Tensor]) -> np.ndarray:
    """The normalisation as the release does it, by plain operators; image (3, 256, 256) in 0..1."""
    x = torch.from_numpy(image)[None]
    for name in BLOCKS:
        at = {k.removeprefix(f"backbone.{name}."): v for k, v in state.items() if f".{name}." in k}
        x = F.conv2d(x, at["0.weight"], at["0.bias"])
        x = F.batch_norm(x, at["1.running_mean"], at["1.running_var"], at["1.weight"], at["1.bias"])
        x = F.conv2d(F.relu(x), at["3.weight"], at["3.bias"], padding=1)
        x = x if name == "conv_block5" else F.max_pool2d(x, 2)
    x = x.flatten(1)
    for name in ("fc1.0", "fc2.0", "fc3.0"):
        x = F.relu(F.linear(x, state[f"backbone.{name}.weight"], state[f"backbone.{name}.bias"]))
    p5, p95 = F.linear(x, state["backbone.fc4.weight"], state["backbone.fc4.bias"])[0].reshape(2, 3).numpy()
    moved = np.empty_like(image)
    for band in range(3):
        own5, own95 = np.percentile(image[band], (5, 95))
        moved[band] = (image[band] - own5) * (p95[band] - p5[band]) / (own95 - own5) + p5[band]
    return moved


class AttributeDict(dict):
    """What a training script leaves in its checkpoint."""


def loss(*_: object) -> None:
    raise AssertionError("code out of a checkpoint was run")


class Plain:
    def __init__(self) -> None:
        self.best = Path("model.ckpt")


class Trap:
    def __reduce__(self) -> Any:
        return loss, (1,)


@pytest.fixture
def network(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], None]:
    """`network(checkpoint)` serves it at the bucket's real path; the shipped table, but for the host."""
    shutil.copytree(bundled_dir("data_manifests"), tmp_path / "mirrored")
    path = tmp_path / "mirrored" / "models.yaml"
    path.write_text(path.read_text().replace("https://dataforgood-fb-data.s3.amazonaws.com", server.url))
    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "mirrored"))
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))

    def put(checkpoint: dict) -> None:
        torch.save(checkpoint, tmp_path / "net.ckpt")
        name = "aerial_normalization_quantiles_predictor.ckpt"
        content = (tmp_path / "net.ckpt").read_bytes()
        server.put(f"/forests/v1/models/saved_checkpoints/{name}", content)

    return put


def test_v1_aerial_is_the_published_normalisation_and_is_recorded(network: Callable, tmp_path: Path) -> None:
    """On a scene of one crop, where asking crop by crop and once a scene are the same."""
    state = published_state()
    network(
        {
            "epoch": 3,
            "state_dict": state,
            "hyper_parameters": AttributeDict(loss=loss, opt=partial(loss, 1)),
            "callbacks": {Trap: Trap(), "x": Plain()},
        }
    )
    pixels = np.random.default_rng(3).integers(1, 200, (3, 256, 256), dtype=np.uint8)
    place = Affine(0.5, 0, 310_000, 0, -0.5, 4_170_000)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=256, height=256, count=3, dtype="uint8",
        crs="EPSG:32617", transform=place, photometric="RGB",
    ) as out:  # fmt: skip
        out.write(pixels)
    model, source = _model(), canopy.open_imagery(tmp_path / "a.tif")
    area = source.area()
    assert area is not None
    with pytest.raises(InputError, match=r"made for v1's models.*--radiometry match"):
        with_radiometry(model, source, area, "v1-aerial")
    model.card = {"name": "v1-pretended"}
    moved, text, _ = with_radiometry(model, source, area, "v1-aerial")
    ours = moved.moved(torch.from_numpy(pixels / np.float32(255))[None])[0].numpy()
    wanted = published_way((pixels / np.float32(255)), state)
    np.testing.assert_allclose(ours, wanted, atol=2e-4)  # the tags' five digits
    target = [float(v) for v in text.split(" -> ")[1].split(",")]
    p = published_percentiles(wanted)
    np.testing.assert_allclose(target, p, atol=2e-4)
    again = canopy.predict(
        tmp_path / "a.tif", model=model, radiometry=text.replace(" -> ", ","), device="cpu"
    )
    asked = canopy.predict(tmp_path / "a.tif", model=model, radiometry="v1-aerial", device="cpu")
    assert np.array_equal(again.values, asked.values, equal_nan=True)


def published_percentiles(moved: np.ndarray) -> np.ndarray:
    """5th and 95th of each band of an image that was moved onto them."""
    return np.percentile(moved, (5, 95), axis=(1, 2)).T.ravel()


@pytest.mark.parametrize("fault", ["missing", "shape", "code"])
def test_another_network_is_refused_and_nothing_of_it_runs(network: Callable, fault: str) -> None:
    state = published_state()
    checkpoint: dict[str, Any] = {"state_dict": state}
    if fault == "missing":
        del state["backbone.fc3.0.weight"]
    elif fault == "shape":
        state["backbone.fc4.weight"], state["backbone.fc4.bias"] = torch.zeros(13, 32), torch.zeros(13)
    else:
        checkpoint["callbacks"] = __import__("os").system
    network(checkpoint)
    with pytest.raises(
        CheckpointError, match="could run code" if fault == "code" else "aerial normalisation"
    ):
        load_percentile_net(aerial_network())
