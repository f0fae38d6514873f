"""A torch model for batches of one shape: recorded as a CUDA graph, or compiled.

Small networks keep a large GPU waiting for the next kernel: a recorded graph starts all of them at once.
Batches on a GPU are always full (see `Predictor`), so one shape is enough; any other number of crops, and any
failure to record or compile, is run eagerly with the same arithmetic.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

from canopy.errors import ConfigError
from canopy.inference.backends.runner import HEIGHT, TorchRunner

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel
    from canopy.models.radiometry import Stretch

log = logging.getLogger("canopy")
MODES = ("eager", "graph", "compile")
_WARM_UP = 3  # passes before recording: libraries choose their kernels then


class StaticRunner(TorchRunner):
    """See the module's text. The image is not checked for NaN, which would make the host wait for the device.

    Args:
        mode: `graph` (CUDA only), `compile` (torch.compile, which needs a C compiler), or `eager`.
    """

    def __init__(
        self,
        model: HeightModel,
        device: torch.device,
        precision: str = "fp32",
        outputs: tuple[str, ...] = (HEIGHT,),
        mode: str = "graph",
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode {mode!r}", expected=", ".join(MODES))
        super().__init__(model, device, precision, outputs)
        from canopy.inference.backends.parts import LayerPart, ScorePart

        self.mode = mode if mode != "graph" or device.type == "cuda" else "eager"
        self._scores, self._layers = ScorePart(self.model).eval(), LayerPart(self.model, outputs).eval()
        if self.mode == "compile":
            self.backend = "torch-compiled"
            self._compile()
        self._stretch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._into: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """As `TorchRunner.forward`, for finite images."""
        if self._stretch is not None:
            factor, offset = self._stretch
            rgb = rgb * factor + offset
        if self.mode == "graph" and self._graph is None and self._into is None:
            self._record(rgb)
        if self._graph is None or self._into is None or self._made is None or rgb.shape != self._into.shape:
            return self._eager(rgb)
        self._into.copy_(rgb)
        self._graph.replay()
        return self._made.clone()

    def _eager(self, rgb: torch.Tensor) -> torch.Tensor:
        import torch

        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self._layers(self._scores(self.arranged(rgb)).float()).float()

    def _record(self, rgb: torch.Tensor) -> None:
        import torch

        self._into = rgb.clone()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._eager(self._into)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Autocast would keep its copies of the weights in the graph's memory, where the next pass
            # overwrites them.
            with torch.cuda.graph(graph), torch.autocast("cuda", cache_enabled=False, enabled=False):
                self._made = self._eager(self._into)
            self._graph = graph
        except torch.OutOfMemoryError:
            self._into = None
            raise
        except RuntimeError as error:
            log.warning("the network runs kernel by kernel: no CUDA graph (%s)", str(error).split("\n")[0])

    def _compile(self) -> None:
        import torch

        compiled = torch.compile(self._scores, dynamic=False, mode="max-autotune-no-cudagraphs")
        plain = self._scores
        broken = False  # here and not in self: copies with other radiometry share the attempt

        def scores(rgb: torch.Tensor) -> torch.Tensor:
            nonlocal broken
            if broken:
                return plain(rgb)
            try:
                return compiled(rgb)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may raise
                log.warning("the network is not compiled (%s)", str(error).strip().split("\n")[0][:160])
                broken = True
                return plain(rgb)

        self._scores = scores  # type: ignore[assignment]

    def with_radiometry(self, stretch: Stretch | None) -> StaticRunner:
        import torch

        other = copy.copy(self)
        other._stretch = None
        if stretch is not None:
            factor, offset = (torch.tensor(v, device=self.device) for v in stretch.factors())
            other._stretch = factor.view(1, -1, 1, 1), offset.view(1, -1, 1, 1)
        return other
