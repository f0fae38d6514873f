"""What a runtime does for a prediction, and torch as the first of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel
    from canopy.models.radiometry import Stretch

# Layers a runner may be asked for are those of `HeightModel.layers`; this one every model has.
HEIGHT = "height_m"


class Runner(Protocol):
    """A model that is ready to run on one device in one precision.

    Attributes:
        backend: `torch`, `torch-compiled`, `openvino` or `onnx`.
        precision: `fp32`, `bf16` or `int8`.
        device: where it runs.
        outputs: layers of `HeightModel.layers` it gives, in order; the first is `height_m`.
        alone: whether a crop's layers are the same bytes alone and in company of others.
    """

    backend: str
    precision: str
    device: torch.device
    outputs: tuple[str, ...]
    alone: bool

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(n, 3, crop, crop) float32 in 0..1, finite -> (n, len(outputs), crop, crop) float32."""
        ...

    def with_radiometry(self, stretch: Stretch | None) -> Runner:
        """This runner, its weights shared, for images that are moved by `stretch` first."""
        ...


class TorchRunner:
    """The model itself, eager, on any device that torch has; see `Runner`."""

    backend = "torch"
    # A batch of one takes other kernels, and its heights differ in the last bits.
    alone = False

    def __init__(
        self,
        model: HeightModel,
        device: torch.device,
        precision: str = "fp32",
        outputs: tuple[str, ...] = (HEIGHT,),
    ) -> None:
        self.model = model.to(device).eval()
        self.device, self.precision, self.outputs = device, precision, outputs
        # A GPU's convolutions are fastest with the channels innermost; on CPUs it makes no difference.
        self._channels_last = device.type == "cuda" and _is_cnn(model)
        if self._channels_last:
            import torch

            self.model = self.model.to(memory_format=torch.channels_last)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        import torch

        return self.forward(torch.from_numpy(rgb).to(self.device)).cpu().numpy()

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """(n, 3, crop, crop) on `device` -> layers (n, len(outputs), crop, crop) float32, there too."""
        import torch

        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            rgb = self.arranged(rgb)
            if self.outputs == (HEIGHT,):
                return self.model(rgb).float()
            return self.model.layers(rgb, self.outputs).float()

    def arranged(self, rgb: torch.Tensor) -> torch.Tensor:
        """The same crops in the memory layout that the network is fastest with."""
        import torch

        return rgb.contiguous(memory_format=torch.channels_last) if self._channels_last else rgb

    def with_radiometry(self, stretch: Stretch | None) -> TorchRunner:
        other = copy.copy(self)
        other.model = self.model.with_radiometry(stretch)
        return other


def _is_cnn(model: HeightModel) -> bool:
    encoder = getattr(model.config, "encoder", None)
    return encoder is not None and encoder.family == "cnn"
