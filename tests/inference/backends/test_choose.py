"""What `auto` stands for, what goes together, and one clear line where it does not."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from canopy.errors import CanopyError, ConfigError, InputError
from canopy.inference.backends import settle, weights_sha256
from canopy.models.height import HeightModel


class Unheard(torch.nn.Module):
    """A head with an operation that no runtime knows."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.special.bessel_j0(x))


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


def test_a_model_that_cannot_be_converted(saved, cache) -> None:
    model: HeightModel = saved("cnn", seed=9)
    model.decoder.head.conv3 = Unheard(model.decoder.head.conv3)
    choice = settle(model, device="cpu")
    assert choice.backend == "torch"
    assert len(choice.notes) == 1 and choice.notes[0].endswith("torch is used instead")
    assert "\n" not in choice.notes[0]
    crops = np.random.default_rng(1).random((1, 3, 64, 64), np.float32)
    assert np.isfinite(choice.open(model)(crops)).all()
    for backend, title in (("openvino", "OpenVINO cannot convert"), ("onnx", "cannot be exported to ONNX")):
        with pytest.raises(CanopyError, match=title) as caught:
            settle(model, backend)
        assert "\n" not in str(caught.value) and "--backend torch" in str(caught.value)
    assert not list(cache.glob("*.zip"))


def test_a_foreign_module_is_not_converted() -> None:
    with pytest.raises(ConfigError, match="a Identity cannot be converted"):
        settle(torch.nn.Identity(), "openvino")  # type: ignore[arg-type]


def test_converting_leaves_the_model_as_it_is(saved, cache) -> None:
    for family in ("vit-timm", "rope-stem"):
        model = saved(family)
        before = weights_sha256(model)
        crops = torch.rand(1, 3, 96, 96)
        with torch.inference_mode():
            expected = model(crops)
        settle(model, "onnx")
        with torch.inference_mode():  # other sizes than the crop's still work
            assert torch.equal(model(crops), expected)
        assert weights_sha256(model) == before
