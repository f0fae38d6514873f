"""What a map is made with, ready to make it: all of `canopy predict`'s, or one tile of `canopy map`'s."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.geo.aoi import AOI
from canopy.inference import output
from canopy.inference.backends.runner import Runner
from canopy.inference.engine import RunSummary, Sink, predict_grid
from canopy.inference.extras import Extras
from canopy.inference.request import Request
from canopy.inference.target import Target
from canopy.runtime import Progress

if TYPE_CHECKING:
    from canopy.models.height import HeightModel
    from canopy.sources.imagery import ImagerySource

# What a resampled map's summary takes from the run that predicted; the rest counts the map's own pixels.
_OF_THE_NETWORK = (
    "windows", "crops", "crops_predicted", "batch_size", "model_seconds", "black_share", "notes"
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Imagery, area, model and grids of a map.

    `runner` is the model on its runtime; without one it is torch, as the request has it.
    """

    request: Request
    source: ImagerySource
    aoi: AOI
    model: HeightModel
    model_name: str
    target: Target
    radiometry: str = "none"
    extras: Extras = field(default_factory=Extras)
    runner: Runner | None = None

    @property
    def bands(self) -> tuple[tuple[str, str], ...]:
        """Names and units of the map's bands, in order."""
        return self.extras.bands

    @property
    def model_sha256(self) -> str:
        return self.model.sha256 or "unsaved"

    def tags(self, scenes: output.Scenes | None = None) -> dict[str, str]:
        """Tags of the GeoTIFF; no wall-clock time and no folders. `scenes`: those in it, if not all."""
        gsd_m = self.target.output.gsd_m
        tags = output.map_tags(scenes or self.source, self.model_name, self.model_sha256, gsd_m)
        tags |= output.extra_tags(self.extras, self.model.card)
        if self.runner:
            tags |= {"CANOPY_BACKEND": self.runner.backend, "CANOPY_PRECISION": self.runner.precision}
        return tags | ({"CANOPY_RADIOMETRY": self.radiometry} if self.radiometry != "none" else {})

    def predict_into(self, sink: Sink, progress: Progress | None, out: Path | None = None) -> RunSummary:
        """Predict into `sink`, by way of a scratch file beside `out` where the output has another grid."""
        request, target = self.request, self.target
        options: dict[str, Any] = {
            "device": request.device,
            "precision": request.precision,
            "batch_size": request.batch_size,
            "runner": self.runner,
            "workers": request.workers,
            "progress": progress,
        }
        if not target.is_resampled:
            return predict_grid(
                self.model, self.source, target.predict, sink,
                aoi=self.aoi, extras=self.extras, **options,
            )  # fmt: skip
        from canopy.inference.regrid import Scratch, regrid

        with ExitStack() as stack:
            # Beside the output: the system's temporary folder is often small, or memory.
            beside = out.absolute().parent if out else None
            prefix = f".{out.name}.canopy-" if out else ".canopy-"
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=beside))
            path = Path(folder) / "predicted.tif"
            with Scratch(path, target.predict, self.extras.layers) as scratch:
                run = predict_grid(
                    self.model, self.source, target.predict, scratch,
                    aoi=target.reach(self.aoi), extras=replace(self.extras, raw=True), **options,
                )  # fmt: skip
            final = regrid(
                path, target.output, sink, self.source,
                aoi=self.aoi, extras=self.extras, whole=target.whole, progress=progress,
            )  # fmt: skip
        return replace(final, **{name: getattr(run, name) for name in _OF_THE_NETWORK})
