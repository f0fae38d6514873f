"""The hub edition of v2 against `transformers`' own implementation, with random weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from canopy.errors import CheckpointError, ConfigError
from canopy.models.checkpoint import load_model
from canopy.models.published import convert, recognise

transformers = pytest.importorskip("transformers", reason="the independent judge of v2 is not installed")
_spec = importlib.util.spec_from_file_location("originals", Path(__file__).with_name("originals.py"))
originals = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(originals)

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (originals.MEAN, originals.STD))
TAPS = (0, 2, 3, 4)


def _reference(dim: int = 64, depth: int = 5, post: tuple[int, ...] = (8, 16, 32, 64), **more: object):
    """A random CHMv2 model whose weights are as lively as trained ones."""
    torch.manual_seed(1)
    backbone = {
        "model_type": "dinov3_vit", "hidden_size": dim, "intermediate_size": 4 * dim,
        "num_hidden_layers": depth, "num_attention_heads": 2,
        "num_register_tokens": 4, "out_indices": [tap + 1 for tap in TAPS],
        "reshape_hidden_states": True, "apply_layernorm": True, "return_class_token": True,
        "layer_norm_eps": 1e-6, "key_bias": False, "image_size": 416,
    }  # fmt: skip
    config = transformers.CHMv2Config(
        backbone_config=backbone | more,
        post_process_channels=list(post),
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    model = transformers.CHMv2ForDepthEstimation(config).eval()
    random = originals.Random(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            one = 0.3 if "lambda" in name else one
            p.copy_(random(*p.shape, scale=0.1 if p.ndim == 1 else None, about=one))
    return model


@torch.inference_mode()
def _metres(model: torch.nn.Module, rgb: torch.Tensor) -> np.ndarray:
    return model((rgb - MEAN) / STD).predicted_depth[:, None].numpy()


@torch.inference_mode()
def _ours(path: Path, rgb: torch.Tensor) -> np.ndarray:
    return load_model(path)(rgb).numpy()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    """A reference model and its directory in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub")
    model = _reference()
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("size", [(256, 256), (448, 448), (256, 384), (32, 64)], ids=str)
def test_heights_are_those_of_transformers(hub, size: tuple[int, int], tmp_path: Path) -> None:
    model, folder = hub
    done = convert(folder, tmp_path / "m.safetensors")
    assert done.recognised.found == "v2, hub edition (transformers layout): v2-64x5"
    assert done.card["licence"] == "DINOv3 License"
    assert (done.recognised.config.crop_px, done.recognised.config.gsd_m) == (448, 0.6)
    rgb = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3))
    wanted = _metres(model, rgb)
    assert wanted.std() > 0.1  # a dead network would prove nothing
    assert np.abs(_ours(tmp_path / "m.safetensors", rgb) - wanted).max() < 1e-3


def test_the_fixture_of_v2_against_transformers(shared: Path, tmp_path: Path) -> None:
    """The fixture's original files, loaded by us and, renamed by the tests' own table, by transformers."""
    folder = shared / "fixtures" / "published_v2"
    backbone, head = (torch.load(folder / f"tiny_{n}.pth", weights_only=True) for n in ("backbone", "head"))
    config = transformers.CHMv2Config(
        backbone_config={
            "model_type": "dinov3_vit", "hidden_size": 128, "intermediate_size": 512,
            "num_hidden_layers": 8, "num_attention_heads": 2,
            "num_register_tokens": 4, "out_indices": [2, 4, 6, 8], "key_bias": False,
            "reshape_hidden_states": True, "apply_layernorm": True, "return_class_token": True,
            "layer_norm_eps": 1e-5, "image_size": 416,
        },
        post_process_channels=[16, 32, 64, 128], fusion_hidden_size=32, head_hidden_size=16,
    )  # fmt: skip
    judge = transformers.CHMv2ForDepthEstimation(config).eval()
    judge.load_state_dict(originals.hub_state(backbone, head), strict=True)
    out = tmp_path / "m.safetensors"
    convert(folder / "tiny_backbone.pth", out, backbone=folder / "tiny_head.pth", config=folder / "tiny.json")
    rgb = torch.from_numpy(np.load(folder / "tiny_io.npz")["rgb_uint8"]).permute(0, 3, 1, 2).float() / 255
    assert np.abs(_ours(out, rgb) - _metres(judge, rgb)).max() < 1e-3


def test_key_bias_of_the_hub(tmp_path: Path) -> None:
    model = _reference(key_bias=True)
    model.save_pretrained(tmp_path / "hub")
    done = convert(tmp_path / "hub", tmp_path / "m.safetensors")
    assert done.recognised.config.encoder.k_bias
    rgb = torch.rand(1, 3, 64, 96)
    assert np.abs(_ours(tmp_path / "m.safetensors", rgb) - _metres(model, rgb)).max() < 1e-3


def test_shards_files_and_older_names_are_the_same_model(hub, tmp_path: Path) -> None:
    model, folder = hub
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(folder / "config.json", older)
    state = load_file(folder / "model.safetensors")
    state = {k.replace("backbone.model.layer.", "backbone.layer."): v for k, v in state.items()}
    save_file(state, older / "any name.bin")
    rgb = torch.rand(1, 3, 64, 64)
    wanted = _metres(model, rgb)
    for source in (tmp_path / "shards", older / "any name.bin", folder / "model.safetensors"):
        convert(source, tmp_path / "m.safetensors", overwrite=True)
        assert np.abs(_ours(tmp_path / "m.safetensors", rgb) - wanted).max() < 1e-3


def test_a_lone_file_needs_its_sizes(hub, tmp_path: Path) -> None:
    _, folder = hub
    shutil.copy(folder / "model.safetensors", tmp_path / "lone.safetensors")
    with pytest.raises(CheckpointError, match=r"--config"):
        recognise(tmp_path / "lone.safetensors")
    whole = recognise(folder)
    assert recognise(tmp_path / "lone.safetensors", config=folder / "config.json").config == whole.config
    (tmp_path / "s.json").write_text(json.dumps({"num_heads": 2, "taps": list(TAPS)}))
    assert recognise(tmp_path / "lone.safetensors", config=tmp_path / "s.json").config == whole.config


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"readout_type": "add"}, CheckpointError, "readout_type is 'add'"),
        ({"norm_strategy": "softmax"}, CheckpointError, "norm_strategy"),
        ({"fusion_hidden_size": 99}, ConfigError, "fusion_channels is 99, but the tensors have 16"),
        ({"backbone_config": {"use_gated_mlp": True}}, CheckpointError, "use_gated_mlp"),
        ({"backbone_config": {"out_indices": [1, 2]}}, ConfigError, "out_indices"),
    ],
)
def test_settings_that_would_mean_other_arithmetic(
    hub, change: dict, error, words: str, tmp_path: Path
) -> None:
    _, folder = hub
    shutil.copytree(folder, tmp_path / "hub")
    settings = json.loads((folder / "config.json").read_text())
    inner = settings["backbone_config"] | change.get("backbone_config", {})
    settings |= {**change, "backbone_config": inner}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(error, match=words):
        recognise(tmp_path / "hub")


def test_indexes_stay_in_their_folder(hub, tmp_path: Path) -> None:
    model, _ = hub
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    for wrong, words in (("../elsewhere.safetensors", "plain file names"), ("gone.safetensors", "missing")):
        changed = content | {"weight_map": content["weight_map"] | {name: wrong}}
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=words):
            recognise(tmp_path)
    (tmp_path / "void").mkdir()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        recognise(tmp_path / "void")
