"""Pixels to the device and heights back, beside the work of the network.

On a CPU nothing moves. To a GPU a window goes once, as bytes where the image was bytes, from page-locked
memory on a stream of its own; finished heights come back the same way, and whoever needs them waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

WHITE = np.float32(255)


@dataclass(frozen=True)
class Packed:
    """RGB (3, h, w) on its way to the device: float32 in 0..1, or uint8 where that says the same."""

    host: torch.Tensor


class Download:
    """An array on its way back; `numpy` waits for it."""

    def __init__(self, host: torch.Tensor, ready: torch.cuda.Event | None = None) -> None:
        self._host, self._ready = host, ready

    def numpy(self) -> np.ndarray:
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.numpy()


class Transfer:
    """Moves windows to `device` and finished pixels back.

    Args:
        device: where the network runs.
        as_bytes: send bytes where the image was bytes; by default where there is a bus to cross.
    """

    def __init__(self, device: torch.device, as_bytes: bool | None = None) -> None:
        import torch

        self.device = device
        self._cuda = device.type == "cuda"
        self._as_bytes = self._cuda if as_bytes is None else as_bytes
        # One each way: a window going up must not wait for heights coming down.
        self._up = torch.cuda.Stream(device) if self._cuda else None
        self._down = torch.cuda.Stream(device) if self._cuda else None
        # On the device, or torch would multiply by the reciprocal, which differs in the last bit.
        self._white = torch.tensor(float(WHITE), device=device)

    def pack(self, rgb: np.ndarray) -> Packed:
        """Make float32 RGB (3, h, w) ready to go; to be called from reader threads."""
        import torch

        host = torch.from_numpy(rgb)
        if self._as_bytes:
            coded = (host * float(WHITE)).round_().clamp_(0, 255).to(torch.uint8)
            # NaN, resampled and 16-bit pixels are no whole number of 255ths, and stay as they are.
            if torch.equal(coded / torch.tensor(float(WHITE)), host):
                host = coded
        return Packed(host.pin_memory() if self._cuda else host)

    def up(self, packed: Packed) -> torch.Tensor:
        """The window on the device, float32 in 0..1; does not wait for it."""
        import torch

        if self._up is None:
            moved = packed.host.to(self.device)
        else:
            work = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._up):
                moved = packed.host.to(self.device, non_blocking=True)
            work.wait_stream(self._up)
            moved.record_stream(work)  # so that its memory is not given away while the network reads it
        return moved.to(torch.float32) / self._white if moved.dtype == torch.uint8 else moved

    def down(self, made: torch.Tensor) -> Download:
        """Start to bring `made` back."""
        import torch

        if self._down is None:
            return Download(made.cpu())
        host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            host.copy_(made, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        made.record_stream(self._down)
        return Download(host, ready)
