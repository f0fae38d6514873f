"""Runtimes: what `auto` stands for, what goes together, and that every one gives what torch gives."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

import canopy
from canopy.errors import CanopyError, CheckpointError, ConfigError, InputError, OutputError
from canopy.inference import backends
from canopy.inference.backends import read_card, read_network, settle, write_network
from canopy.models.checkpoint import weights_sha256
from canopy.models.height import HeightModel, Stretch

OUTPUTS = ("height_m", "spread_m")
MOST_M = 1e-3
STRETCH = Stretch(source=(0.1, 0.6, 0.1, 0.5, 0.1, 0.4), target=(0.05, 0.9, 0.1, 0.8, 0.1, 0.7))
FACTS = {"backend": "openvino", "weights_sha256": "ab"}


def crops_of(seed: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


# ---- what is used -----------------------------------------------------------------------------
def test_auto_is_openvino_on_a_cpu_where_it_is_installed(saved, unsaved, monkeypatch) -> None:
    model = saved("cnn")
    assert settle(model, device="cpu").names == {"backend": "openvino", "precision": "fp32", "device": "cpu"}
    # Those with a card elsewhere settle for torch without having it here.
    assert settle(model, device="cuda").backend == settle(model, device="cuda:1").backend == "torch"
    # A network from memory is not worth a conversion; another one has no layers.
    assert settle(unsaved("cnn"), device="cpu").backend == "torch"
    assert settle(torch.nn.Identity(), device="cpu").backend == "torch"  # type: ignore[arg-type]
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
        (("onnx", "bf16", "auto"), "ONNX Runtime has no bf16"),
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
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
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
    assert choice.backend == "torch"
    assert len(choice.notes) == 1 and choice.notes[0].endswith("torch is used instead")
    assert "\n" not in choice.notes[0]
    assert torch.isfinite(choice.open(model).forward(crops_of(1))).all()
    for backend, title in (("openvino", "OpenVINO cannot convert"), ("onnx", "cannot be exported to ONNX")):
        with pytest.raises(CanopyError, match=title) as caught:
            settle(model, backend)
        assert "\n" not in str(caught.value) and "--backend torch" in str(caught.value)
    assert not list(cache.glob("*.zip"))
    with pytest.raises(ConfigError, match="a Identity cannot be converted"):
        settle(torch.nn.Identity(), "openvino")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_every_backend(saved, cache, backend, value) -> None:
    """OpenVINO would make a smooth map of them."""
    model = saved("cnn", seed=5)
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[3] = value
    with pytest.raises(CheckpointError, match=r"encoder\.\S+ holds values that are not numbers"):
        settle(model, backend)


# ---- what they give ---------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["vit", "vit-timm", "rope-v3", "rope-stem", "cnn"])
@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_all_layers_are_those_of_torch(saved, family: str, backend: str) -> None:
    model, crops = saved(family), crops_of(1, 3)
    before, other = weights_sha256(model), torch.rand(1, 3, 96, 96)
    expected = settle(model, "torch", device="cpu").open(model, OUTPUTS).forward(crops)
    runner = settle(model, backend).open(model, OUTPUTS)
    found = runner.forward(crops)
    assert (runner.backend, runner.precision, runner.outputs) == (backend, "fp32", OUTPUTS)
    assert found.dtype == torch.float32 and found.shape == (3, 2, 64, 64)
    assert expected[:, 0].std() > 0.02
    torch.testing.assert_close(found, expected, atol=MOST_M, rtol=0)
    # A crop alone is the crop in company, to the byte: a map must not depend on how it was cut.
    assert torch.equal(runner.forward(crops[1:2]), found[1:2])
    # The model is as it was, and takes images of other sizes than its crop's.
    assert weights_sha256(model) == before and torch.isfinite(model(other)).all()


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_a_moved_radiometry_is_moved_alike(saved, backend: str) -> None:
    model, crops = saved("cnn").with_radiometry(STRETCH), crops_of(2)
    with torch.inference_mode():
        expected = model(crops)
    plain = settle(saved("cnn"), backend).open(saved("cnn"))
    for runner in (settle(model, backend).open(model), plain.with_radiometry(STRETCH)):
        torch.testing.assert_close(runner.forward(crops), expected, atol=MOST_M, rtol=0)
    assert not torch.allclose(plain.forward(crops), expected, atol=MOST_M)


def test_bf16_is_near_and_fp32_is_not_secretly_bf16(saved) -> None:
    if not getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"):
        pytest.skip("this processor has no bf16")
    model, crops = saved("cnn"), crops_of(3)
    half = settle(model, "openvino", "bf16").open(model)
    apart = (half.forward(crops) - settle(model, "openvino").open(model).forward(crops)).abs()
    assert half.precision == "bf16" and 0 < apart.mean() < 0.5 and apart.max() > MOST_M


def test_the_default_model_on_a_real_image(shared: Path) -> None:
    model = canopy.load_model("default")
    with (shared / "data/manifest.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["split"] == "val")
    with rasterio.open(shared / "data" / row["rgb_path"]) as dataset:
        side = model.config.crop_px
        window = rasterio.windows.Window(0, 0, side, side)
        image = dataset.read([1, 2, 3], window=window, boundless=True, fill_value=0)
    crops = torch.from_numpy(image[None].astype(np.float32) / 255)
    expected = settle(model, "torch", device="cpu").open(model, OUTPUTS).forward(crops)
    assert expected[:, 0].max() > 5
    for backend in ("openvino", "onnx"):
        found = settle(model, backend).open(model, OUTPUTS).forward(crops)
        torch.testing.assert_close(found, expected, atol=MOST_M, rtol=0)


# ---- maps -------------------------------------------------------------------------------------
def test_a_map_says_what_made_it_and_does_not_depend_on_batches(saved, tmp_path: Path) -> None:
    image, model, maps = tmp_path / "texture.tif", saved("cnn"), {}
    pixels = np.random.default_rng(0).integers(20, 200, (3, 100, 120), np.uint8)
    with rasterio.open(
        image, "w", driver="GTiff", width=120, height=100, count=3, dtype="uint8", crs="EPSG:32618",
        transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_882_000),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    for backend in ("torch", "openvino", "onnx"):
        out = tmp_path / f"{backend}.tif"
        seen = set()
        for batch_size, workers in ((1, 1), (3, 2)) if backend != "torch" else ((4, 1),):
            canopy.predict(
                image, model=model, backend=backend, out=out, device="cpu", overwrite=True,
                batch_size=batch_size, workers=workers,
            )  # fmt: skip
            seen.add(out.read_bytes())
        assert len(seen) == 1
        with rasterio.open(out) as dataset:
            tags, maps[backend] = dataset.tags(), dataset.read(1)
        assert (tags["CANOPY_BACKEND"], tags["CANOPY_PRECISION"]) == (backend, "fp32")
        facts = json.loads(out.with_suffix(".json").read_text())["properties"]["canopy:model"]
        assert (facts["backend"], facts["precision"]) == (backend, "fp32")
    np.testing.assert_allclose(maps["openvino"], maps["torch"], atol=1e-3)
    np.testing.assert_allclose(maps["onnx"], maps["torch"], atol=1e-3)


# ---- the cache --------------------------------------------------------------------------------
def test_what_is_written_is_read(tmp_path: Path) -> None:
    files, path = {"model.xml": b"<net/>", "model.bin": bytes(range(256))}, tmp_path / "deep/a.zip"
    write_network(path, files, {"crop_px": 64})
    assert read_network(path) == files and read_card(path)["crop_px"] == 64
    first = path.read_bytes()
    write_network(path, files, {"crop_px": 64})
    assert path.read_bytes() == first


@pytest.mark.parametrize("harm", ["flip", "cut", "text"])
def test_a_damaged_file_is_told_and_made_anew(cache: Path, caplog, harm: str) -> None:
    makes = []

    def make() -> dict[str, bytes]:
        makes.append(1)
        return {"model.bin": b"\x07" * 5000}

    backends._cached("m", "OpenVINO", FACTS, make)
    path = next(cache.glob("*.zip"))
    data = bytearray(path.read_bytes())
    data[data.index(b"\x07" * 100) + 50] ^= 1
    path.write_bytes(bytes({"flip": data, "cut": data[:3000], "text": b"hello"}[harm]))
    with pytest.raises(CheckpointError, match=path.name):
        read_network(path)
    with caplog.at_level(logging.WARNING, logger="canopy"):
        assert backends._cached("m", "OpenVINO", FACTS, make)["model.bin"] == b"\x07" * 5000
    assert len(makes) == 2 and "made anew" in caplog.text
    assert backends._cached("m", "OpenVINO", FACTS, make) and len(makes) == 2


def _want(folder: str, log: str) -> None:
    """In another process: the conversion, which takes a while and is noted when it is made."""
    os.environ["CANOPY_CACHE"] = folder

    def make() -> dict[str, bytes]:
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return {"model.bin": b"x" * 100_000}

    if backends._cached("m", "OpenVINO", FACTS, make)["model.bin"] != b"x" * 100_000:
        raise SystemExit(5)


def test_of_several_processes_one_converts_and_all_get_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_want, args=(str(tmp_path / "c"), str(log))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
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
    model, crops = saved("cnn", seed=4), crops_of(1, 1)
    with caplog.at_level(logging.INFO, logger="canopy"):
        before = settle(model, "onnx").open(model).forward(crops)
        assert "converting cnn-4 for ONNX Runtime, once" in caplog.text
        caplog.clear()
        assert torch.equal(settle(model, "onnx").open(model).forward(crops), before)
        assert "converting" not in caplog.text
    assert len(list(cache.glob("*.zip"))) == 1
    with torch.no_grad():
        list(model.decoder.parameters())[-2].mul_(0.5)  # fine-tuned since it was loaded, as it were
        expected = model(crops)
    after = settle(model, "onnx").open(model).forward(crops)
    torch.testing.assert_close(after, expected, atol=1e-3, rtol=0)
    assert (after - before).abs().max() > 0.01
