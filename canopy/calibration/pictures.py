"""Diagnostic pictures of calibrations, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.files import replacing

if TYPE_CHECKING:
    from canopy.calibration.discs import Footprints
    from canopy.calibration.gedi_fit import Correction


def draw_correction(path: Path, shots: Footprints, correction: Correction, report: dict[str, Any]) -> None:
    """Two panels: shots against the map with the fitted curve, and the change with its standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    top = float(max(10.0, np.nanpercentile(shots.map_m, 99.5), np.percentile(shots.height_m, 99)))
    heights = np.arange(0.0, top + 0.1, 0.25)
    level, error = correction.heights(heights, 1.0), correction.errors(heights, 0.0)
    left.plot(shots.reported_m, shots.height_m, ".", ms=3, alpha=0.4, color="tab:blue", label="shots")
    left.plot(heights, shots.expect(heights), "--", color="0.5", lw=1, label="no change")
    left.plot(heights, shots.expect(level), color="tab:red", label=report["method"])
    left.set(xlim=(0, top), ylim=(0, top * 1.15), xlabel=f"map, P{shots.percent} of the disc (m)")
    left.set_ylabel(f"GEDI RH{shots.percent} (m)")
    left.legend(loc="upper left", fontsize=8)
    right.fill_between(heights, level - heights - 2 * error, level - heights + 2 * error, alpha=0.25,
                       color="tab:red", lw=0, label="± 2 standard errors")  # fmt: skip
    right.plot(heights, level - heights, color="tab:red")
    right.axhline(0, color="0.5", lw=1, ls="--")
    right.set(xlim=(0, top), xlabel="map height (m)", ylabel="change (m)", title=_headline(report))
    right.title.set_fontsize(9)
    right.legend(loc="best", fontsize=8)
    save(figure, path)


def _headline(report: dict[str, Any]) -> str:
    scores = report.get("held_out", {})
    if not scores.get("n"):
        return ""
    before, after = scores["before"]["mae_good_m"], scores[report["method"]]["mae_good_m"]
    return f"held-out shots: MAE {before} m before, {after} m after"


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; OutputError where that is impossible."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130, metadata={"Software": None})
