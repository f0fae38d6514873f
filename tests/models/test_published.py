"""Published checkpoints: exact heights, recognition by content, and one clear line for everything else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from canopy.errors import CheckpointError, ConfigError, InputError
from canopy.models.checkpoint import load_checkpoint
from canopy.models.foreign import open_weights
from canopy.models.published import convert, recognise

SIZES = {"num_heads": 2, "taps": [0, 1, 2, 3]}
POST, WHOLE = (8, 16, 32, 64), (128, 256, 512, 1024)


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(SIZES))
    return path


@pytest.fixture
def v1_file(originals, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({"state_dict": originals.v1(64, 5, POST, 16), "epoch": 3}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@torch.inference_mode()
def _heights(model: torch.nn.Module, rgb: torch.Tensor) -> np.ndarray:
    return model(rgb).numpy()


# ---- what comes out ---------------------------------------------------------------------------------------
# The heights of the tiny files of ../shared/fixtures are held to the originals' in tests/behaviour.
@pytest.mark.parametrize(
    ("name", "release", "size", "heads", "taps"),
    [
        ("v1-huge", "v1", (1280, 32), 20, (9, 16, 22, 29)),
        ("v1-large", "v1", (1024, 24), 16, (4, 11, 17, 23)),
        ("v2-large", "v2", (1024, 24), 16, (5, 11, 17, 23)),
    ],
)
def test_the_published_sizes_are_recognised(originals, name, release, size, heads, taps, tmp_path) -> None:
    """Every key and shape of the real sizes is accounted for; the files hold one number for each tensor."""
    parts = [originals.v1(*size, WHOLE, zeros=True)]
    if release == "v2":
        parts = originals.v2(*size, heads, WHOLE, zeros=True)
        assert len(parts[1]) == 68 and sum(v.numel() for v in parts[1].values()) == 33_747_200
    paths = [tmp_path / f"{i}.pth" for i in range(len(parts))]
    for path, state in zip(paths, parts, strict=True):
        torch.save({"state_dict": state}, path)
    found = recognise(paths[0], backbone=paths[1] if paths[1:] else None)
    encoder, decoder = found.config.encoder, found.config.decoder
    assert found.name == name and found.release == release
    assert (encoder.heads, encoder.taps, encoder.depth) == (heads, taps, taps[-1] + 1)
    assert (found.config.gsd_m, found.config.crop_px) == {"v1": (0.5, 256), "v2": (0.6, 448)}[release]
    assert (decoder.bin_max * decoder.scale, decoder.spacing) == (
        (100, "linear") if release == "v1" else (96, "blend")
    )
    assert {k: t.shape for k, t in found.tensors.items() if "blocks.0.mlp.fc1" in k} == {
        "encoder.vit.blocks.0.mlp.fc1.weight": (4 * size[0], size[0]),
        "encoder.vit.blocks.0.mlp.fc1.bias": (4 * size[0],),
    }


def test_quantised_layers_are_dequantised_exactly(tmp_path: Path) -> None:
    """Both ways torch.ao stores a dynamically quantised Linear, per tensor and per channel."""
    layer = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)
        chosen = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        channels = torch.ao.quantization.quantize_dynamic(layer, chosen, dtype=torch.qint8)
        for quantised in (plain, channels):
            torch.save(quantised.state_dict(), tmp_path / "q.pth")
            file = open_weights(tmp_path / "q.pth")
            assert set(file.tensors) == {"0.weight", "0.bias", "1.weight"} and file.quantised == 2
            for i in (0, 1):
                assert torch.equal(file.tensors[f"{i}.weight"], quantised[i].weight().dequantize())
            assert torch.equal(file.tensors["0.bias"], layer[0].bias)


def test_conversion_is_the_same_each_time_and_half_stays_close(v1_file, sizes, tmp_path) -> None:
    done = convert(v1_file, tmp_path / "m.safetensors", config=sizes)
    # Blocks behind the last tap never run; what lay beside the weights is named too.
    assert "epoch" in done["dropped"]
    assert {k.split(".")[2] for k in done["dropped"] if ".blocks." in k} == {"4"}
    model = load_checkpoint(tmp_path / "m.safetensors")
    assert model.sha256 == done["sha256"]
    assert model.card["licence"] == "Apache-2.0" and "2304.07213" in model.card["source"]
    assert model.card["inputs"][0]["file"] == "a.pth" and len(model.card["inputs"][0]["sha256"]) == 64
    assert np.allclose(model.config.percentiles[:2], (0.42 - 1.645 * 0.213, 0.42 + 1.645 * 0.213), atol=1e-3)
    assert convert(v1_file, tmp_path / "n.safetensors", config=sizes)["sha256"] == done["sha256"]
    with pytest.raises(InputError, match="exists"):
        convert(v1_file, tmp_path / "m.safetensors", config=sizes)
    half = convert(v1_file, tmp_path / "h.safetensors", config=sizes, half=True)
    assert half["bytes"] < 0.6 * done["bytes"]
    rgb = torch.rand(1, 3, 64, 64)
    apart = _heights(model, rgb) - _heights(load_checkpoint(tmp_path / "h.safetensors"), rgb)
    assert 0 < np.abs(apart).max() < 0.2


def test_v2_wrappers_order_rounded_periods_and_key_biases(originals, sizes, tmp_path) -> None:
    torch.manual_seed(0)
    backbone, head = originals.v2(64, 5, 2, POST, 16)
    torch.save({"model": {f"module.{k}": v for k, v in head.items()}}, tmp_path / "head.pth")
    found, rgb = {}, torch.ones(1, 3, 64, 96).cumsum(3) / 96
    rounded = backbone["rope_embed.periods"].bfloat16()
    for name in ("masked", "nan", "open", "rounded"):
        for i in range(5):
            bias, mask = (backbone[f"blocks.{i}.attn.qkv.{k}"] for k in ("bias", "bias_mask"))
            mask[64:128] = 1.0 if name == "open" else 0.0
            bias[64:128] = float("nan") if name == "nan" else 2.0
        torch.save(
            backbone | ({"rope_embed.periods": rounded} if name == "rounded" else {}), tmp_path / "b.pth"
        )
        files = (tmp_path / "head.pth", tmp_path / "b.pth")[:: -1 if name == "nan" else 1]
        done = convert(files[0], tmp_path / f"{name}.safetensors", backbone=files[1], config=sizes)
        assert done["found"] == "v2, original backbone and head: v2-64x5"
        model = load_checkpoint(tmp_path / f"{name}.safetensors")
        assert model.config.encoder.k_bias is (name == "open")
        assert bool(model.config.encoder.rope_periods) is (name == "rounded")
        found[name] = _heights(model, rgb)
    assert torch.equal(model.encoder.vit.rope.periods, rounded.float())
    assert np.array_equal(found["masked"], found["nan"])
    assert np.abs(found["masked"] - found["open"]).max() > 1e-5


# ---- the hub's edition, against transformers' own implementation ------------------------------------------
@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    """`hub(key_bias)` -> a random CHMv2 model, as lively as a trained one, and its directory."""
    transformers = pytest.importorskip("transformers", reason="the independent judge is not installed")

    def make(key_bias: bool = False):
        torch.manual_seed(1)
        backbone = {
            "model_type": "dinov3_vit", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5,
            "num_attention_heads": 2, "num_register_tokens": 4, "out_indices": [1, 3, 4, 5],
            "reshape_hidden_states": True, "apply_layernorm": True, "return_class_token": True,
            "layer_norm_eps": 1e-6, "key_bias": key_bias, "image_size": 416,
        }  # fmt: skip
        config = transformers.CHMv2Config(
            backbone_config=backbone, post_process_channels=list(POST), fusion_hidden_size=16,
            head_hidden_size=8,
        )  # fmt: skip
        model = transformers.CHMv2ForDepthEstimation(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                one = 1.0 if "norm" in name and name.endswith("weight") else 0.3 if "lambda" in name else 0.0
                scale = 0.1 if p.ndim == 1 else max(1, p[0].numel()) ** -0.5
                p.copy_(one + scale * torch.randn_like(p))
        folder = tmp_path_factory.mktemp("hub")
        model.save_pretrained(folder)
        return model, folder

    return make


@torch.inference_mode()
def _metres(model: torch.nn.Module, rgb: torch.Tensor) -> np.ndarray:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.420, 0.411, 0.296), (0.213, 0.156, 0.143)))
    return model((rgb - mean) / std).predicted_depth[:, None].numpy()


@pytest.mark.parametrize("key_bias", [False, True])
def test_heights_are_those_of_transformers(hub, key_bias: bool, tmp_path: Path) -> None:
    model, folder = hub(key_bias)
    done = convert(folder, tmp_path / "m.safetensors")
    assert done["found"] == "v2, hub edition (transformers layout): v2-64x5"
    assert done["licence"] == "DINOv3 License" and done["config"]["encoder"]["k_bias"] is key_bias
    for size in ((448, 448), (256, 384), (32, 64)):
        rgb = torch.rand(1, 3, *size)
        wanted = _metres(model, rgb)
        assert wanted.std() > 0.1 or size[0] < 100  # a dead network would prove nothing
        assert np.abs(_heights(load_checkpoint(tmp_path / "m.safetensors"), rgb) - wanted).max() < 1e-3


def test_lone_files_and_older_names_are_the_same_model(hub, tmp_path: Path) -> None:
    _, folder = hub()
    whole, older = recognise(folder), tmp_path / "any name.bin"
    state = load_file(folder / "model.safetensors")
    save_file({k.replace("backbone.model.layer.", "backbone.layer."): v for k, v in state.items()}, older)
    with pytest.raises(CheckpointError, match=r"--config"):
        recognise(older)
    (tmp_path / "s.json").write_text(json.dumps({"num_heads": 2, "taps": [0, 2, 3, 4]}))
    for config in (folder / "config.json", tmp_path / "s.json"):
        found = recognise(older, config=config)
        assert found.config == whole.config
        assert all(torch.equal(found.tensors[k], whole.tensors[k]) for k in whole.tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"readout_type": "add"}, "readout_type is 'add'"),
        ({"fusion_hidden_size": 99}, "fusion_channels is 99, but the tensors have 16"),
        ({"backbone_config": {"use_gated_mlp": True}}, "use_gated_mlp"),
        ({"backbone_config": {"out_indices": [1, 2]}}, "out_indices"),
    ],
)
def test_settings_that_would_mean_other_arithmetic(hub, change: dict, words: str, tmp_path: Path) -> None:
    shutil.copytree(hub()[1], tmp_path / "hub")
    settings = json.loads((tmp_path / "hub" / "config.json").read_text())
    inner = settings["backbone_config"] | change.get("backbone_config", {})
    (tmp_path / "hub" / "config.json").write_text(json.dumps(settings | change | {"backbone_config": inner}))
    with pytest.raises((CheckpointError, ConfigError), match=words):
        recognise(tmp_path / "hub")


# ---- what is refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", r"1 differences.*missing blocks\.1\.mlp\.fc1\.weight \(256, 64\)"),
        ("extra", r"unexpected backbone\.register_tokens \(1, 4, 64\)"),
        ("shape", r"fc1\.weight is \(255, 64\), expected \(256, 64\)"),
        ("nan", r"not numbers"),
    ],
)
def test_every_key_and_shape_counts(how: str, words: str, originals, tmp_path: Path, sizes: Path) -> None:
    state, name = originals.v1(64, 4, POST, 16), "backbone.blocks.1.mlp.fc1.weight"
    whole = state.pop(name)
    if how == "extra":
        state |= {name: whole, "backbone.register_tokens": torch.zeros(1, 4, 64)}
    elif how != "missing":
        state[name] = whole[:-1] if how == "shape" else whole * float("nan")
    torch.save({"state_dict": state}, tmp_path / "a.pth")
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


def test_truncated_files(v1_file: Path, tmp_path: Path) -> None:
    state = torch.load(v1_file, weights_only=True)["state_dict"]
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        content = (tmp_path / name).read_bytes()
        for kept in (0.98, 0.5, 0.01):
            (tmp_path / name).write_bytes(content[: int(kept * len(content))])
            with pytest.raises(CheckpointError, match=r"truncated|damaged|whole") as caught:
                recognise(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_other_files_are_told_apart(originals, v1_file: Path, sizes: Path, tmp_path: Path) -> None:
    for name, content in zip(("b.pth", "h.pth"), originals.v2(64, 5, 2, POST, 16), strict=True):
        torch.save(content, tmp_path / name)
    torch.save({"blocks.0.a": torch.zeros(1)}, tmp_path / "dino.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("not a model at all")
    (tmp_path / "void").mkdir()
    convert(v1_file, tmp_path / "ours.safetensors", config=sizes)
    for name, partner, words in (
        ("b.pth", None, "backbone without its head.*--backbone"),
        ("h.pth", None, "head without its backbone.*--backbone"),
        ("h.pth", "h.pth", "hold a v2 head and a v2 head; expected the head and the backbone"),
        ("a.pth", "h.pth", "hold a v1 checkpoint and a v2 head"),
        ("a.pth", None, r"not a published size.*--config"),
        ("dino.pth", None, "none of the published.*without a canopy-height head"),
        ("list.pth", None, "holds a list"),
        ("empty.pth", None, "no tensors"),
        ("code.pth", None, r"needs .*torch\.nn\.modules\.linear\.Linear.* to be opened"),
        ("text.pth", None, "neither"),
        ("gone.pth", None, "no such file"),
        ("void", None, r"no model\.safetensors"),
        ("ours.safetensors", None, "weights of a canopy model"),
    ):
        with pytest.raises(CheckpointError, match=f"(?i){words}"):
            recognise(tmp_path / name, backbone=tmp_path / partner if partner else None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"depth": 7}, "depth is 7, but the tensors have 5"),
        ({"taps": [1, 2, 3, 5]}, "taps"),
        ({"num_heads": 5}, "heads"),
        ({"head": 2}, "unknown key 'head'"),
    ],
)
def test_a_config_must_agree(given: dict, words: str, v1_file: Path, sizes: Path) -> None:
    sizes.write_text(json.dumps(SIZES | given))
    with pytest.raises(ConfigError, match=words):
        recognise(v1_file, config=sizes)
