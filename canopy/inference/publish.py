"""What lies beside a finished map: its picture and its STAC item."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from canopy.inference import output
from canopy.inference.engine import RunSummary
from canopy.inference.stac_item import MapFacts, map_item, write_json

if TYPE_CHECKING:
    from canopy.inference.job import Job


def publish(job: Job, made: Path, sha256: str, summary: RunSummary) -> list[str]:
    """Write the quicklook, if one was asked for, and the STAC item beside a finished map; their names.

    Args:
        made: the map under its own name, though not yet in its place (see `CogWriter.companions`).
    """
    files = output.OutputFiles.of(made, job.request.quicklook)
    if files.quicklook is not None:
        from canopy.inference.quicklook import write_quicklook

        write_quicklook(
            files.tif,
            files.quicklook,
            title=f"Canopy height, {job.aoi.describe()}",
            subtitle=f"{output.bare_name(job.source.name)} ({output.dates_text(job.source.dates)}), "
            f"model {job.model_name}",
        )
    facts = MapFacts(
        path=files.tif,
        sha256=sha256,
        grid=job.target.output,
        encoding=job.request.encoding,
        bands=job.bands,
        dates=job.source.dates,
        imagery=output.imagery_links(job.source),
        model={
            "name": job.model_name,
            "sha256": job.model_sha256,
            "licence": str(job.model.card.get("licence", "")),
            **({"backend": job.runner.backend, "precision": job.runner.precision} if job.runner else {}),
        },
        quicklook=files.quicklook,
        statistics={
            "mean": summary.mean_height_m,
            "maximum": summary.max_height_m,
            "valid_percent": 100 * summary.valid_fraction,
        },
    )
    write_json(files.item, map_item(facts))
    return [path.name for path in files.all[1:]]
