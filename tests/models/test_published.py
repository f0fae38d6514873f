"""Published checkpoints: exact heights, recognition by content, and one clear line for everything else."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from canopy.errors import CheckpointError, ConfigError, InputError
from canopy.models.checkpoint import load_model
from canopy.models.height import HeightModel
from canopy.models.published import convert, recognise
from canopy.models.published_tables import open_foreign


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


originals = _load("originals")
SIZES = {"num_heads": 2, "taps": [0, 1, 2, 3]}
POST = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def fixtures(shared: Path) -> Path:
    return shared / "fixtures"


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(SIZES))
    return path


@pytest.fixture(scope="module")
def v1_state() -> dict[str, torch.Tensor]:
    return originals.v1_state(64, 5, POST, fusion=16, hidden=8)


@pytest.fixture(scope="module")
def v2_states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return originals.v2_states(64, 5, 2, POST, fusion=16, hidden=8)


def _rgb(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path)["rgb_uint8"]).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def _heights(model: torch.nn.Module, rgb: torch.Tensor) -> np.ndarray:
    return model(rgb).numpy()


def test_v1_plain_fixture_to_a_millimetre(fixtures: Path, tmp_path: Path) -> None:
    folder, out = fixtures / "published_v1", tmp_path / "m.safetensors"
    done = convert(folder / "tiny.pth", out, config=folder / "tiny.json")
    heights = _heights(load_model(out), _rgb(folder / "tiny_io.npz"))
    assert np.abs(heights - np.load(folder / "tiny_io.npz")["height_m"]).max() < 1e-3
    assert done.recognised.found == "v1, plain: v1-128x8"
    assert set(done.recognised.dropped) == {
        "backbone.mask_token",
        "backbone.norm.weight",
        "backbone.norm.bias",
    }


def test_v1_quantised_fixture_is_dequantised_exactly(fixtures: Path, tmp_path: Path) -> None:
    folder, out = fixtures / "published_v1", tmp_path / "m.safetensors"
    done = convert(folder / "tiny_compressed.pth", out, config=folder / "tiny.json")
    assert "quantised (36 layers" in done.recognised.found
    model, rgb = load_model(out), _rgb(folder / "tiny_io.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = torch.load(folder / "tiny_compressed.pth", weights_only=True)
        state = {}
        for name, value in raw.items():
            if name.endswith("._packed_params._packed_params"):
                base = name.removesuffix("._packed_params._packed_params")
                state |= {f"{base}.weight": value[0].dequantize(), f"{base}.bias": value[1]}
            elif isinstance(value, torch.Tensor):
                state[name] = value
    # In fp32, exactly what the dequantised weights give; the reference also quantised activations.
    heights = _heights(model, rgb)
    assert np.abs(heights - originals.v1_forward(state, rgb, 2, (1, 3, 5, 7)).numpy()).max() < 1e-3
    assert np.abs(heights - np.load(folder / "tiny_compressed_io.npz")["height_m"]).max() < 0.15


def test_v2_original_fixture(fixtures: Path, tmp_path: Path) -> None:
    """Heights of the original code in fp32: a wrong tap, norm or bin spacing moves them by metres."""
    folder, out = fixtures / "published_v2", tmp_path / "m.safetensors"
    done = convert(
        folder / "tiny_head.pth", out, backbone=folder / "tiny_backbone.pth", config=folder / "tiny.json"
    )
    difference = (
        _heights(load_model(out), _rgb(folder / "tiny_io.npz")) - np.load(folder / "tiny_io.npz")["height_m"]
    )
    assert np.abs(difference).max() < 1e-3
    assert done.recognised.config.encoder.k_bias is False  # masked, though the file holds values there
    assert done.recognised.config.encoder.rope_periods == ()


def test_v1_of_another_size_against_plain_arithmetic(
    v1_state: dict[str, torch.Tensor], tmp_path: Path, sizes: Path
) -> None:
    torch.save({"state_dict": v1_state, "epoch": 3}, tmp_path / "a.bin")
    done = convert(tmp_path / "a.bin", tmp_path / "m.safetensors", config=sizes)
    rgb = torch.rand(2, 3, 96, 128)
    wanted = originals.v1_forward(v1_state, rgb, 2, (0, 1, 2, 3)).numpy()
    assert np.abs(_heights(load_model(tmp_path / "m.safetensors"), rgb) - wanted).max() < 1e-3
    # Blocks behind the last tap never run; what lay beside the weights is named too.
    assert "epoch" in done.recognised.dropped
    assert {k.split(".")[2] for k in done.recognised.dropped if ".blocks." in k} == {"4"}


def test_half_keeps_heights_close_and_halves_the_file(
    v1_state: dict[str, torch.Tensor], tmp_path: Path, sizes: Path
) -> None:
    torch.save({"state_dict": v1_state}, tmp_path / "a.pth")
    full = convert(tmp_path / "a.pth", tmp_path / "f.safetensors", config=sizes)
    half = convert(tmp_path / "a.pth", tmp_path / "h.safetensors", config=sizes, half=True)
    assert half.path.stat().st_size < 0.6 * full.path.stat().st_size
    rgb = torch.rand(1, 3, 64, 64)
    difference = _heights(load_model(full.path), rgb) - _heights(load_model(half.path), rgb)
    assert 0 < np.abs(difference).max() < 0.2


def test_wrappers_order_and_names_do_not_matter(v2_states: tuple, tmp_path: Path, sizes: Path) -> None:
    backbone, head = v2_states
    torch.save(backbone, tmp_path / "head.pth")  # named wrongly on purpose
    torch.save({"model": {f"module.{k}": v for k, v in head.items()}}, tmp_path / "backbone.pth")
    one = recognise(tmp_path / "head.pth", backbone=tmp_path / "backbone.pth", config=sizes)
    other = recognise(tmp_path / "backbone.pth", backbone=tmp_path / "head.pth", config=sizes)
    assert one.found == other.found == "v2, original backbone and head: v2-64x5"
    assert one.config == other.config and one.config.multiple_px == 32


def test_key_bias_acts_only_where_the_mask_lets_it(v2_states: tuple, tmp_path: Path, sizes: Path) -> None:
    backbone, head = ({k: v.clone() for k, v in state.items()} for state in v2_states)
    torch.save(head, tmp_path / "h.pth")
    outputs = {}
    for name in ("masked", "nan", "open"):
        for i in range(5):
            bias, mask = (backbone[f"blocks.{i}.attn.qkv.{k}"] for k in ("bias", "bias_mask"))
            mask[64:128] = 1.0 if name == "open" else 0.0
            bias[64:128] = float("nan") if name == "nan" else 2.0
        torch.save(backbone, tmp_path / "b.pth")
        out = tmp_path / f"{name}.safetensors"
        done = convert(tmp_path / "h.pth", out, backbone=tmp_path / "b.pth", config=sizes)
        assert done.recognised.config.encoder.k_bias is (name == "open")
        outputs[name] = _heights(load_model(out), torch.ones(1, 3, 64, 96).cumsum(3) / 96)
    assert np.array_equal(outputs["masked"], outputs["nan"])
    assert np.abs(outputs["masked"] - outputs["open"]).max() > 1e-4


def test_rounded_rotary_periods_are_kept(v2_states: tuple, tmp_path: Path, sizes: Path) -> None:
    backbone, head = v2_states
    rounded = backbone["rope_embed.periods"].bfloat16()
    torch.save(backbone | {"rope_embed.periods": rounded}, tmp_path / "b.pth")
    torch.save(head, tmp_path / "h.pth")
    done = convert(tmp_path / "h.pth", tmp_path / "m.safetensors", backbone=tmp_path / "b.pth", config=sizes)
    assert done.recognised.config.encoder.rope_periods == tuple(rounded.float().tolist())
    loaded = load_model(tmp_path / "m.safetensors")
    assert torch.equal(loaded.encoder.vit.rope.periods, rounded.float())


def test_card_and_metadata(v1_state: dict[str, torch.Tensor], tmp_path: Path, sizes: Path) -> None:
    torch.save({"state_dict": v1_state}, tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", tmp_path / "m.safetensors", config=sizes)
    model = load_model(tmp_path / "m.safetensors")
    assert model.sha256 == done.sha256
    assert model.card["licence"] == "Apache-2.0" and "2304.07213" in model.card["source"]
    assert len(model.card["inputs"][0]["sha256"]) == 64 and model.card["inputs"][0]["file"] == "a.pth"
    assert (model.config.gsd_m, model.config.crop_px, model.config.bands) == (
        0.5,
        256,
        ("red", "green", "blue"),
    )
    assert np.allclose(
        model.config.percentiles[:2], (0.420 - 1.645 * 0.213, 0.420 + 1.645 * 0.213), atol=1e-3
    )
    # The same input gives the same file, and an existing one stays.
    again = convert(tmp_path / "a.pth", tmp_path / "n.safetensors", config=sizes)
    assert again.sha256 == done.sha256
    with pytest.raises(InputError, match="exists"):
        convert(tmp_path / "a.pth", tmp_path / "m.safetensors", config=sizes)


def _broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    state, name = dict(state), "backbone.blocks.1.mlp.fc1.weight"
    if how == "missing":
        del state[name]
    elif how == "extra":
        state["backbone.register_tokens"] = torch.zeros(1, 4, 64)
    elif how == "shape":
        state[name] = state[name][:-1]
    elif how == "nan":
        state[name] = state[name] * float("nan")
    return state


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", r"1 differences.*missing backbone\.blocks\.1\.mlp\.fc1\.weight \(256, 64\)"),
        ("extra", r"unexpected backbone\.register_tokens \(1, 4, 64\)"),
        ("shape", r"fc1\.weight is \(255, 64\), expected \(256, 64\)"),
        ("nan", r"not numbers"),
    ],
)
def test_every_key_and_shape_counts(
    how: str, words: str, v1_state: dict[str, torch.Tensor], tmp_path: Path, sizes: Path
) -> None:
    torch.save({"state_dict": _broken(v1_state, how)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(tmp_path / "a.pth", tmp_path / "m.safetensors", config=sizes)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert [p.name for p in tmp_path.iterdir() if "safetensors" in p.name] == []


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malicious_pickles_are_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.zeros(2)}, "hook": _Attack(tmp_path / "owned")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"needs (posix|nt)\.system"):
        recognise(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(_Attack(tmp_path / "owned")))
    with pytest.raises(CheckpointError):
        recognise(tmp_path / "b.pth")
    assert not (tmp_path / "owned").exists()


def test_foreign_classes_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"needs .*torch\.nn\.modules\.linear\.Linear.* to be opened"):
        recognise(tmp_path / "a.pth")


@pytest.mark.parametrize("kept", [0.98, 0.5, 0.01])
def test_truncated_files(kept: float, v1_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": v1_state}, tmp_path / "a.pth")
    save_file({k: v.contiguous() for k, v in v1_state.items()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(kept * len(content))])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|whole") as caught:
            recognise(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_other_models_are_told_apart(v2_states: tuple, tmp_path: Path) -> None:
    backbone, head = v2_states
    torch.save(backbone, tmp_path / "b.pth")
    torch.save(head, tmp_path / "h.pth")
    torch.save({"blocks.0.a": torch.zeros(1)}, tmp_path / "dino.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("not a model at all")
    for name, partner, words in (
        ("b.pth", None, "backbone without its head.*--backbone"),
        ("h.pth", None, "head without its backbone.*--backbone"),
        ("h.pth", "h.pth", "so is the other"),
        ("dino.pth", None, "none of the published.*without a canopy-height head"),
        ("list.pth", None, "holds a list"),
        ("empty.pth", None, "no tensors"),
        ("text.pth", None, "neither"),
        ("gone.pth", None, "no such file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            recognise(tmp_path / name, backbone=tmp_path / partner if partner else None)


def test_a_canopy_model_needs_no_conversion(v1_state: dict, tmp_path: Path, sizes: Path) -> None:
    torch.save({"state_dict": v1_state}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "m.safetensors", config=sizes)
    with pytest.raises(CheckpointError, match="weights of a canopy model"):
        recognise(tmp_path / "m.safetensors")


def test_sizes_that_tensors_cannot_tell(v1_state: dict, tmp_path: Path, sizes: Path) -> None:
    torch.save({"state_dict": v1_state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"not a published size.*--config"):
        recognise(tmp_path / "a.pth")
    for given, words in (
        ({**SIZES, "depth": 7}, "depth is 7, but the tensors have 5"),
        ({**SIZES, "taps": [1, 2, 3, 5]}, "taps"),
        ({**SIZES, "num_heads": 5}, "heads"),
        ({**SIZES, "head": 2}, "unknown key 'head'"),
    ):
        sizes.write_text(json.dumps(given))
        with pytest.raises(ConfigError, match=words):
            recognise(tmp_path / "a.pth", config=sizes)


def test_the_real_layout_of_dynamic_quantisation(tmp_path: Path) -> None:
    """Both ways torch.ao stores a dynamically quantised Linear, per tensor and per channel."""
    layer = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)
        chosen = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        channels = torch.ao.quantization.quantize_dynamic(layer, chosen, dtype=torch.qint8)
        for quantised in (plain, channels):
            torch.save(quantised.state_dict(), tmp_path / "q.pth")
            file = open_foreign(tmp_path / "q.pth")
            assert set(file.tensors) == {"0.weight", "0.bias", "1.weight"} and file.quantised == 2
            for i in (0, 1):
                weight = file.tensors[f"{i}.weight"].read()
                assert weight.dtype == torch.float32
                assert torch.equal(weight, quantised[i].weight().dequantize())
                assert (weight - layer[i].weight).abs().max() < 0.01
            assert torch.equal(file.tensors["0.bias"].read(), layer[0].bias)


def test_padding_is_a_multiple_of_two_tokens(v1_state: dict, tmp_path: Path, sizes: Path) -> None:
    torch.save({"state_dict": v1_state}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "m.safetensors", config=sizes)
    model = load_model(tmp_path / "m.safetensors")
    rgb = torch.rand(1, 3, 80, 48)
    mirrored = torch.nn.functional.pad(rgb, (0, 16, 0, 16), mode="reflect")
    assert np.array_equal(_heights(model, rgb), _heights(model, mirrored)[..., :80, :48])
    assert _heights(model, torch.rand(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    odd = HeightModel(replace(model.config, multiple_px=0))
    odd.load_state_dict(model.state_dict())
    assert np.abs(_heights(odd.eval(), rgb) - _heights(model, rgb)).max() > 1e-3
