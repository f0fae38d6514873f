"""Checkpoint files: what goes in comes out, and every broken file gets one clear line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from canopy.errors import CheckpointError
from canopy.models.checkpoint import describe, load_model, load_strict, read_header, save_checkpoint


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model("ours")
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model, {"name": "tiny", "licence": "Apache-2.0"}, half=False)
    return model, path


@pytest.mark.parametrize("family", ["v1-like", "v2-like", "ours"])
def test_round_trip_is_exact_in_fp32_and_close_in_fp16(make_model, tmp_path, family):
    model, image = make_model(family), torch.rand(1, 3, 40, 56)
    path = tmp_path / "m.safetensors"
    sha = save_checkpoint(path, model, {"name": "tiny"}, half=False)
    again = load_model(path)
    assert torch.equal(again(image), model(image))
    assert not again.training and again.card == {"name": "tiny"} and again.config == model.config
    assert again.sha256 == sha == hashlib.sha256(path.read_bytes()).hexdigest()
    full = path.stat().st_size
    save_checkpoint(path, model, {}, half=True)
    assert path.stat().st_size < 0.75 * full
    small = load_model(path)
    assert all(p.dtype == torch.float32 for p in small.parameters())
    torch.testing.assert_close(small(image), model(image), atol=0.05, rtol=1e-2)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_description_counts_without_loading(saved):
    model, path = saved
    facts = describe(path)
    assert facts["parameters"] == model.parameter_count
    assert facts["name"] == "tiny" and facts["gsd_m"] == 0.5 and facts["crop_px"] == 256


def expect_one_line(path, *words):
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    for word in words:
        assert word in text, text


def test_missing_renamed_and_misshapen_weights_are_named(saved):
    _, path = saved
    state, header = load_file(path), read_header(path)[0]
    state["encoder.vit.blocks.0.extra"] = torch.zeros(2)
    del state["encoder.vit.cls_token"]
    state["decoder.head.conv3.bias"] = torch.zeros(3)
    save_file(state, path, metadata=header)
    expect_one_line(
        path,
        "3 differences",
        "missing encoder.vit.cls_token (1, 1, 32)",
        "unexpected encoder.vit.blocks.0.extra (2,)",
        "decoder.head.conv3.bias is (3,), expected (16,)",
    )


def test_a_long_difference_is_cut_short():
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(9)])
    with pytest.raises(CheckpointError, match=r"18 differences.*and 10 more"):
        load_strict(model, {}, "x")


@pytest.mark.parametrize("keep", [4, 100, 0.5, -1])
def test_truncated_files(saved, keep):
    _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    expect_one_line(path, "truncated" if keep != 4 else "not a safetensors")


def test_foreign_files(saved, tmp_path):
    _, _path = saved
    pickle = tmp_path / "SSLhuge.pth"
    torch.save({"state_dict": {}}, pickle)
    expect_one_line(pickle, "pickle", "canopy models convert")
    torch.save({"a": 1}, pickle, _use_new_zipfile_serialization=False)
    expect_one_line(pickle, "pickle")
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(2)}, other)
    expect_one_line(other, "without canopy's metadata", "canopy models convert")
    text = tmp_path / "page.safetensors"
    text.write_text("<html>404 not found</html>" * 5)
    expect_one_line(text, "not a safetensors file")
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    expect_one_line(empty, "not a safetensors file")
    expect_one_line(tmp_path, "directory")


def test_newer_files_say_so(saved):
    _, path = saved
    state, header = load_file(path), read_header(path)[0]
    save_file(state, path, metadata={**header, "format_version": "9"})
    expect_one_line(path, "format version 9", "update canopy".capitalize())
    save_file(state, path, metadata={**header, "config": '{"wings": 2}'})
    expect_one_line(path, "wings")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(CheckpointError, match=r"no model 'defualt'.*default"):
        load_model("defualt")


@pytest.mark.parametrize("half", [True, False])
def test_the_same_model_gives_the_same_file(small_model: Path, tmp_path: Path, half: bool) -> None:
    model = load_model(small_model)
    first = save_checkpoint(tmp_path / "a.safetensors", model, {"name": "a", "b": 1, "c": 2}, half=half)
    assert (
        save_checkpoint(tmp_path / "b.safetensors", model, {"name": "a", "b": 1, "c": 2}, half=half) == first
    )
    assert load_model(tmp_path / "a.safetensors").card["name"] == "a"


def test_weights_that_are_no_numbers_are_neither_written_nor_loaded(
    small_model: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(small_model, "pt") as file:
        facts = file.metadata()
    tensors = load_file(small_model)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", facts)
    with pytest.raises(CheckpointError, match="not numbers"):
        load_model(tmp_path / "nan.safetensors")
    model = load_model(small_model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(CheckpointError, match="not numbers"):
        save_checkpoint(tmp_path / "inf.safetensors", model, {})
    assert not (tmp_path / "inf.safetensors").exists()


def test_what_people_hand_over_instead_of_a_model(small_model: Path, tmp_path: Path) -> None:
    """Field case 16: every refusal names the file to give instead, and a run's folder is its model."""
    import shutil

    from safetensors.torch import load_file, save_file

    from canopy.models.registry import load_model as load_any

    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(small_model, run / "model.safetensors")
    assert load_any(run).sha256 == load_model(small_model).sha256
    torch.save({"state_dict": {"model.encoder.x": torch.zeros(1)}, "epoch": 3}, run / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"state of a training run.*run/model\.safetensors"):
        load_any(run / "last.ckpt")
    save_file(load_file(small_model), tmp_path / "bare.safetensors")
    torch.save(load_file(small_model), tmp_path / "bare.pth")
    for name in ("bare.safetensors", "bare.pth"):
        with pytest.raises(CheckpointError, match=r"(?s)weights of a canopy model.*save_checkpoint"):
            load_any(tmp_path / name)
