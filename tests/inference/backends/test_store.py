"""The cache of conversions: made once, by one process, whole, and never for other weights."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from canopy.errors import CheckpointError, OutputError
from canopy.inference.backends import Converted, cached, entry_path, read_converted, settle, write_converted

FACTS = {"backend": "openvino", "precision": "fp32", "part": "scores", "weights_sha256": "ab"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = Converted({"model.xml": b"<net/>", "model.bin": bytes(range(256))}, {"crop_px": 64})
    write_converted(tmp_path / "deep/a.zip", made)
    found = read_converted(tmp_path / "deep/a.zip")
    assert found.parts == made.parts and found.card["crop_px"] == 64
    first = (tmp_path / "deep/a.zip").read_bytes()
    write_converted(tmp_path / "deep/a.zip", made)
    assert (tmp_path / "deep/a.zip").read_bytes() == first


@pytest.mark.parametrize("harm", ["flip", "cut", "text", "foreign"])
def test_a_damaged_file_is_told_and_made_anew(cache: Path, caplog, harm: str) -> None:
    makes = []

    def make() -> dict[str, bytes]:
        makes.append(1)
        return {"model.bin": b"\x07" * 5000}

    cached("m", FACTS, make)
    path = entry_path("m", FACTS)
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[data.index(b"\x07" * 100) + 50] ^= 1
    path.write_bytes(bytes({"flip": data, "cut": data[:3000], "text": b"hello"}.get(harm, data)))
    if harm == "foreign":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("card.json", json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match=path.name):
        read_converted(path)
    with caplog.at_level(logging.WARNING, logger="canopy"):
        assert cached("m", FACTS, make).parts["model.bin"] == b"\x07" * 5000
    assert len(makes) == 2
    assert cached("m", FACTS, make) and len(makes) == 2
    assert not [p for p in cache.iterdir() if p != path]


def _want(folder: str, log: str) -> None:
    """In another process: the conversion, which takes a while and is noted when it is made."""
    import os

    os.environ["CANOPY_CACHE"] = folder

    def make() -> dict[str, bytes]:
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return {"model.bin": b"x" * 100_000}

    if cached("m", FACTS, make).parts["model.bin"] != b"x" * 100_000:
        raise SystemExit(5)


def test_of_several_processes_one_converts_and_all_get_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_want, args=(str(tmp_path / "c"), str(log))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "made\n"


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch, saved) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="CANOPY_CACHE"):
        settle(saved("cnn"), "onnx")
    # `auto` does without.
    choice = settle(saved("cnn"), "auto", device="cpu")
    assert choice.backend == "torch" and "torch is used instead" in choice.notes[0]


def test_changed_weights_never_get_another_models_conversion(cache: Path, saved, caplog) -> None:
    model = saved("cnn", seed=4)
    crops = np.random.default_rng(1).random((1, 3, 64, 64), np.float32)
    with caplog.at_level(logging.INFO, logger="canopy"):
        before = settle(model, "onnx").open(model)(crops)
        assert "converting cnn-4 for ONNX Runtime, once" in caplog.text
        caplog.clear()
        assert np.array_equal(settle(model, "onnx").open(model)(crops), before)
        assert "converting" not in caplog.text
    assert len(list(cache.iterdir())) == 2  # scores and layers
    with torch.no_grad():
        list(model.decoder.parameters())[-2].mul_(0.5)  # fine-tuned since it was loaded, as it were
        expected = model(torch.from_numpy(crops)).numpy()
    after = settle(model, "onnx").open(model)(crops)
    np.testing.assert_allclose(after, expected, atol=1e-3)
    assert np.abs(after - before).max() > 0.01
