"""Runtimes: what `auto` stands for, what goes together, and that OpenVINO gives what torch gives."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

import canopy
from canopy.errors import CanopyError, CheckpointError, InputError, OutputError
from canopy.inference.backends import read_card, read_network, settle, write_network
from canopy.models.checkpoint import weights_sha256
from canopy.models.height import HeightModel, Stretch

OUTPUTS = ("height_m", "spread_m")
MOST_M = 1e-3
STRETCH = Stretch(source=(0.1, 0.6, 0.1, 0.5, 0.1, 0.4), target=(0.05, 0.9, 0.1, 0.8, 0.1, 0.7))


def crops_of(seed: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


# ---- what is used -----------------------------------------------------------------------------
def test_auto_is_openvino_on_a_cpu_where_it_is_installed(saved, monkeypatch) -> None:
    model = saved("cnn")
    choice = settle(model, device="cpu")
    assert (choice.backend, choice.precision, choice.device) == ("openvino", "fp32", "cpu")
    # Those with a card elsewhere settle for torch without having it here.
    assert settle(model, device="cuda").backend == settle(model, device="cuda:1").backend == "torch"
    # A network from memory is not worth a conversion.
    with monkeypatch.context() as patch:
        patch.setattr(model, "sha256", None)
        assert settle(model, device="cpu").backend == "torch"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert settle(model, device="cpu").backend == "torch"
    with pytest.raises(InputError, match=r"OpenVINO is not installed.*canopy-height\[export\]"):
        settle(model, "openvino")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("tensorrt", "auto", "auto"), "--backend: unknown backend 'tensorrt'"),
        (("auto", "fp8", "auto"), "--precision: unknown precision 'fp8'"),
        (("torch", "int8", "auto"), "int8 runs in OpenVINO alone"),
        (("openvino", "auto", "cuda"), "OpenVINO runs on the CPU"),
        (("auto", "int8", "cuda"), "OpenVINO runs on the CPU"),
        (("auto", "int8", "cpu"), "canopy models quantize MODEL --data CHIPS"),
    ],
)
def test_what_does_not_go_together_is_refused(saved, cache, given, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        settle(saved("cnn"), *given)
    assert "\n" not in str(caught.value)


def test_bf16_needs_the_hardware(saved, monkeypatch) -> None:
    model = saved("cnn")
    if getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"):
        half = settle(model, "openvino", "bf16").open(model)
        apart = (half.forward(crops_of(3)) - settle(model, "openvino").open(model).forward(crops_of(3))).abs()
        assert 0 < apart.mean() < 0.5 and apart.max() > MOST_M  # near, and fp32 is not secretly bf16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    for backend in ("auto", "torch", "openvino"):
        with pytest.raises(InputError, match="bf16 is not supported on cpu"):
            settle(model, backend, "bf16", "cpu").open(model)


class Unheard(torch.nn.Module):
    """A head with an operation that no runtime knows."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.special.bessel_j0(x))


def test_a_model_that_cannot_be_converted(saved, cache) -> None:
    model: HeightModel = saved("cnn", seed=9)
    model.decoder.head.conv3 = Unheard(model.decoder.head.conv3)
    choice = settle(model, device="cpu")
    assert choice.backend == "torch" and choice.notes[0].endswith("torch is used instead")
    assert torch.isfinite(choice.open(model).forward(crops_of(1))).all()
    with pytest.raises(CanopyError, match=r"OpenVINO cannot convert.*--backend torch") as caught:
        settle(model, "openvino")
    assert "\n" not in str(caught.value) and not list(cache.glob("*.zip"))


def test_weights_that_are_no_numbers_are_refused(saved, cache) -> None:
    """OpenVINO would make a smooth map of them."""
    model = saved("cnn", seed=5)
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"encoder\.\S+ holds values that are not numbers"):
        settle(model, "openvino")


# ---- what they give ---------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["vit", "vit-timm", "rope-v3", "rope-stem", "cnn"])
def test_all_layers_are_those_of_torch(saved, family: str) -> None:
    model, crops = saved(family).with_radiometry(STRETCH), crops_of(1, 3)
    before = weights_sha256(model)
    expected = settle(model, "torch", device="cpu").open(model, OUTPUTS).forward(crops)
    runner = settle(model, "openvino").open(model, OUTPUTS)
    found = runner.forward(crops)
    assert (runner.backend, runner.precision, runner.outputs) == ("openvino", "fp32", OUTPUTS)
    assert found.dtype == torch.float32 and found.shape == (3, 2, 64, 64)
    assert expected[:, 0].std() > 0.02
    torch.testing.assert_close(found, expected, atol=MOST_M, rtol=0)
    # A crop alone is the crop in company, to the byte: a map must not depend on how it was cut.
    assert torch.equal(runner.forward(crops[1:2]), found[1:2])
    # The model is as it was, and takes images of other sizes than its crop's.
    assert weights_sha256(model) == before and torch.isfinite(model(torch.rand(1, 3, 96, 96))).all()


def test_the_default_model_on_a_real_image(shared: Path) -> None:
    model = canopy.load_model("default")
    with (shared / "data/manifest.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["split"] == "val")
    with rasterio.open(shared / "data" / row["rgb_path"]) as dataset:
        side = model.config.crop_px
        window = rasterio.windows.Window(0, 0, side, side)
        image = dataset.read([1, 2, 3], window=window, boundless=True, fill_value=0)
    crops = torch.from_numpy(image[None].astype(np.float32) / 255)
    expected = settle(model, "torch", device="cpu").open(model).forward(crops)
    assert expected.max() > 5
    found = settle(model, "openvino").open(model).forward(crops)
    torch.testing.assert_close(found, expected, atol=MOST_M, rtol=0)


def test_a_map_says_what_made_it_and_does_not_depend_on_batches(saved, tmp_path: Path) -> None:
    image, model, maps = tmp_path / "texture.tif", saved("cnn"), {}
    pixels = np.random.default_rng(0).integers(20, 200, (3, 100, 120), np.uint8)
    with rasterio.open(
        image, "w", driver="GTiff", width=120, height=100, count=3, dtype="uint8", crs="EPSG:32618",
        transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_882_000),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    for backend, batch_size in (("torch", 4), ("openvino", 1), ("openvino", 3)):
        out = canopy.predict(
            image, model=model, backend=backend, out=tmp_path / "map.tif", device="cpu", overwrite=True,
            batch_size=batch_size,
        )  # fmt: skip
        with rasterio.open(out) as dataset:
            tags, maps[backend, batch_size] = dataset.tags(), dataset.read(1)
        assert (tags["CANOPY_BACKEND"], tags["CANOPY_PRECISION"]) == (backend, "fp32")
        facts = json.loads(out.with_suffix(".json").read_text())["properties"]["canopy:model"]
        assert (facts["backend"], facts["precision"]) == (backend, "fp32")
    assert np.array_equal(maps["openvino", 1], maps["openvino", 3])
    np.testing.assert_allclose(maps["openvino", 1], maps["torch", 4], atol=MOST_M)


# ---- the cache --------------------------------------------------------------------------------
@pytest.mark.parametrize("harm", ["flip", "cut", "text"])
def test_what_is_written_is_read_and_damage_is_told(tmp_path: Path, harm: str) -> None:
    files, path = {"model.xml": b"<net/>", "model.bin": b"\x07" * 5000}, tmp_path / "deep/a.zip"
    write_network(path, files, {"crop_px": 64})
    assert read_network(path) == files and read_card(path)["crop_px"] == 64
    first = path.read_bytes()
    write_network(path, files, {"crop_px": 64})
    assert path.read_bytes() == first
    data = bytearray(first)
    data[data.index(b"\x07" * 100) + 50] ^= 1
    path.write_bytes(bytes({"flip": data, "cut": data[:3000], "text": b"hello"}[harm]))
    with pytest.raises(CheckpointError, match=path.name):
        read_network(path)


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch, saved) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="CANOPY_CACHE"):
        settle(saved("cnn"), "openvino")
    # `auto` does without.
    choice = settle(saved("cnn"), "auto", device="cpu")
    assert choice.backend == "torch" and "torch is used instead" in choice.notes[0]


def test_a_conversion_is_made_once_and_never_used_for_other_weights(cache: Path, saved, caplog) -> None:
    model, crops = saved("cnn", seed=4), crops_of(1, 1)
    with caplog.at_level(logging.INFO, logger="canopy"):
        before = settle(model, "openvino").open(model).forward(crops)
        assert "converting cnn-4 for OpenVINO, once" in caplog.text
        caplog.clear()
        assert torch.equal(settle(model, "openvino").open(model).forward(crops), before)
        assert "converting" not in caplog.text
        (kept,) = cache.glob("*.zip")
        kept.write_bytes(kept.read_bytes()[:3000])
        assert torch.equal(settle(model, "openvino").open(model).forward(crops), before)
        assert "made anew" in caplog.text
    with torch.no_grad():
        list(model.decoder.parameters())[-2].mul_(0.5)  # fine-tuned since it was loaded, as it were
        expected = model(crops)
    after = settle(model, "openvino").open(model).forward(crops)
    torch.testing.assert_close(after, expected, atol=1e-3, rtol=0)
    assert (after - before).abs().max() > 0.01


SIGNALLED = """
import faulthandler, gc, os, signal, sys, threading
from canopy.inference.backends import settle
from canopy.models.registry import load_model

def open_one(kept):
    model = load_model(sys.argv[1])
    kept.append(settle(model, "openvino").open(model))

faulthandler.enable()  # a signal stack that somebody else must not lose
open_one(kept := [])
open_one(kept)
threads = [threading.Thread(target=kept.pop, args=(0,)), threading.Thread(target=open_one, args=(kept,))]
for thread in threads:
    thread.start()
    thread.join()
kept.clear()
gc.collect()
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append("arrived"))
os.kill(os.getpid(), signal.SIGUSR1)
print(*told, "openvino_telemetry.main" in sys.modules, len(threading.enumerate()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of Unix")
def test_signals_arrive_after_runners_came_and_went_and_nothing_is_sent(saved, tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "CANOPY_CACHE": str(tmp_path / "cache")}
    env.pop("CI", None)  # OpenVINO's telemetry spares what says it is CI
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(saved("cnn").path)],
        capture_output=True, text=True, env=env, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["arrived", "False", "1"]
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
