"""Checkpoint files: what goes in comes out, and every broken file gets one clear line."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from canopy.errors import CheckpointError
from canopy.models.checkpoint import (
    describe,
    load_checkpoint,
    load_strict,
    read_header,
    rewrite_card,
    save_checkpoint,
)
from canopy.models.registry import load_model


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model("ours")
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model, {"name": "tiny", "licence": "Apache-2.0", "b": 1}, half=False)
    return model, path


@pytest.mark.parametrize("family", ["v1-like", "v2-like", "ours", "cnn"])
def test_round_trip_is_exact_in_fp32_and_close_in_fp16(make_model, tmp_path, family):
    model, image, path = make_model(family), torch.rand(1, 3, 40, 56), tmp_path / "m.safetensors"
    sha = save_checkpoint(path, model, {"name": "tiny", "b": 1, "c": 2}, half=False)
    again = load_checkpoint(path)
    assert torch.equal(again(image), model(image))
    assert not again.training and again.card == {"name": "tiny", "b": 1, "c": 2}
    assert again.config == model.config and again.path == path
    assert again.sha256 == sha == hashlib.sha256(path.read_bytes()).hexdigest()
    full = path.stat().st_size
    half = save_checkpoint(path, model, {"name": "tiny"}, half=True)
    assert path.stat().st_size < 0.75 * full
    assert save_checkpoint(path, model, {"name": "tiny"}, half=True) == half, "the same model, the same file"
    small = load_checkpoint(path)
    assert all(p.dtype == torch.float32 for p in small.parameters())
    torch.testing.assert_close(small(image), model(image), atol=0.05, rtol=1e-2)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_description_counts_without_loading_and_cards_change_alone(saved, tmp_path):
    model, path = saved
    facts = describe(path)
    assert facts["parameters"] == model.parameter_count
    assert facts["name"] == "tiny" and facts["gsd_m"] == 0.5 and facts["crop_px"] == 256
    rewrite_card(path, tmp_path / "n.safetensors", {"b": 2})
    assert describe(tmp_path / "n.safetensors")["card"] == facts["card"] | {"b": 2}
    before, after = load_file(path), load_file(tmp_path / "n.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def expect_one_line(path, *words):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
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
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(9)])
    with pytest.raises(CheckpointError, match=r"18 differences.*and 10 more"):
        load_strict(model, {}, "x")


def test_foreign_and_damaged_files(saved, tmp_path):
    _, path = saved
    data, header = path.read_bytes(), read_header(path)[0]
    pickle = tmp_path / "SSLhuge.pth"
    torch.save({"state_dict": {}}, pickle)
    expect_one_line(pickle, "pickle", "canopy models convert")
    torch.save({"a": 1}, pickle, _use_new_zipfile_serialization=False)
    expect_one_line(pickle, "pickle")
    expect_one_line(tmp_path, "no such model file")
    save_file({"w": torch.zeros(2)}, path)
    expect_one_line(path, "without canopy's metadata", "canopy models convert")
    for content in (
        b"<html>404 not found</html>" * 5,
        b"",
        *(data[:n] for n in (4, 100, len(data) // 2, -1)),
    ):
        path.write_bytes(content)
        expect_one_line(path, "not a safetensors file", "truncated")
    path.write_bytes(data)
    state = load_file(path)
    save_file(state, path, metadata={**header, "format_version": "9"})
    expect_one_line(path, "format version 9", "Update canopy")
    save_file(state, path, metadata={**header, "config": '{"wings": 2}'})
    expect_one_line(path, "wings")


def test_weights_that_are_no_numbers_are_neither_written_nor_loaded(saved, tmp_path):
    model, path = saved
    tensors, header = load_file(path), read_header(path)[0]
    tensors["encoder.vit.cls_token"][0] = float("nan")
    save_file(tensors, path, header)
    expect_one_line(path, "not numbers")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(CheckpointError, match="not numbers"):
        save_checkpoint(tmp_path / "inf.safetensors", model, {})
    assert not (tmp_path / "inf.safetensors").exists()


def test_what_people_hand_over_instead_of_a_model(saved, tmp_path):
    """Field case 16: every refusal names the file to give instead, and a run's folder is its model."""
    run, path = tmp_path / "run", saved[1]
    run.mkdir()
    shutil.copy(path, run / "model.safetensors")
    assert load_model(run).sha256 == load_model(path).sha256
    torch.save({"state_dict": {"model.encoder.x": torch.zeros(1)}, "epoch": 3}, run / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"state of a training run.*run/model\.safetensors"):
        load_model(run / "last.ckpt")
    save_file(load_file(path), tmp_path / "bare.safetensors")
    torch.save(load_file(path), tmp_path / "bare.pth")
    for name in ("bare.safetensors", "bare.pth"):
        with pytest.raises(CheckpointError, match=r"(?s)weights of a canopy model.*save_checkpoint"):
            load_model(tmp_path / name)
