"""A prediction job: everything settled and checked first (`prepare`), then run (`Job.run`).

Nothing is written before `run`, and nothing that can be known beforehand fails after it has begun.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import AreaError, InputError
from canopy.geo.aoi import AOI
from canopy.geo.raster import raster_env
from canopy.inference import output
from canopy.inference.backends.choose import settle
from canopy.inference.engine import RunSummary, reader_count
from canopy.inference.estimate import Estimate, estimate, refuse_too_large, seconds_per_crop
from canopy.inference.extras import band_specs, extras_of
from canopy.inference.plan import Lattice, Plan, plan_windows
from canopy.inference.radiometry import with_radiometry
from canopy.inference.request import Request
from canopy.inference.target import choose_target, scale_notes
from canopy.inference.work import Work
from canopy.models.radiometry import parse_radiometry
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    import xarray as xr

    from canopy.models.height import HeightModel
    from canopy.sources.imagery import ImagerySource

# Holes that nobody declared are pure black far more often than shadows are.
BLACK_SHARE = 0.005


@dataclass(frozen=True)
class Result:
    """What came out. `data` is the map where it was kept in memory, else None."""

    files: output.OutputFiles | None
    summary: RunSummary
    job: Job
    sha256: str | None = None
    data: xr.DataArray | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: files, statistics, times, and what was used."""
        files = self.files
        statistics = {
            "mean_height_m": self.summary.mean_height_m,
            "max_height_m": self.summary.max_height_m,
            "cover_2m": self.summary.cover_2m,
        }
        return {
            "output": str(files.tif) if files else None,
            "stac_item": str(files.item) if files else None,
            "quicklook": str(files.quicklook) if files and files.quicklook else None,
            "sha256": self.sha256,
            **self.job.to_dict(),
            **{key: (value if self.summary.valid_pixels else None) for key, value in statistics.items()},
            "valid_fraction": self.summary.valid_fraction,
            "crops_predicted": self.summary.crops_predicted,
            "batch_size": self.summary.batch_size,
            "seconds": round(self.summary.seconds, 3),
            "model_seconds": round(self.summary.model_seconds, 3),
            "notes": [*self.job.notes, *self.summary.notes],
        }


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """A checked request. `notes` are warnings for the user; `cost` is what it will take."""

    plan: Plan
    cost: Estimate
    files: output.OutputFiles | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready facts that are known before the run."""
        grid = self.target.output
        return {
            "area": self.aoi.describe(),
            "bounds": list(grid.bounds),
            "crs": f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else grid.crs.to_wkt(),
            "width": grid.width,
            "height": grid.height,
            "gsd_m": grid.gsd_m,
            "model": self.model_name,
            "model_sha256": self.model_sha256,
            "backend": self.runner.backend if self.runner else "torch",
            "precision": self.runner.precision if self.runner else self.request.precision,
            "imagery": output.imagery_text(self.source),
            "dates": output.dates_text(self.source.dates),
            "encoding": self.request.encoding,
            "radiometry": self.radiometry,
            "tiles": self.cost.windows,
            "crops": self.cost.crops,
            "gigabytes": self.cost.gigabytes,
            "estimated_seconds": self.cost.seconds,
        }

    def describe(self) -> list[str]:
        """What is about to happen, for a person: the area line first."""
        grid = self.target.output
        crs = f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else "the image's CRS"
        return [
            f"{self.aoi.describe()}, {self.cost.tiles_text}, {self.cost.time_text}",
            f"imagery {output.bare_name(self.source.name)} ({output.dates_text(self.source.dates)}); "
            f"model {self.model_name} ({self.model_sha256[:12]}){self._runtime_text}",
            f"map of {grid.width} x {grid.height} px, {grid.gsd_m:.3g} m, {crs}",
        ]

    @property
    def _runtime_text(self) -> str:
        return f" in {self.runner.backend} {self.runner.precision}" if self.runner else ""

    def run(self, progress: Progress | None = None) -> Result:
        """Predict and write.

        Raises:
            CanopyError: nothing is left at the output's place then.
        """
        started = time.perf_counter()
        with raster_env():
            result = self._to_files(progress) if self.files else self._to_memory(progress)
        result.summary.seconds = time.perf_counter() - started
        if result.summary.black_share >= BLACK_SHARE:
            note = (
                f"{100 * result.summary.black_share:.1f} % of the pixels with heights are pure black "
                "(0, 0, 0), which cameras hardly record; if there is no image there, give --nodata 0"
            )
            log.warning(f"note: {note}")
            result.summary.notes.append(note)
        return result

    def _to_memory(self, progress: Progress | None) -> Result:
        sink = output.ArraySink(self.target.output, self.bands)
        summary = self.predict_into(sink, progress)
        return Result(None, summary, self, data=sink.to_xarray(self.tags()))

    def _to_files(self, progress: Progress | None) -> Result:
        from canopy.geo.raster import CogWriter
        from canopy.inference.publish import publish

        files, request = self.files, self.request
        if files is None:
            raise RuntimeError("no output was asked for")
        writer = CogWriter(
            files.tif, self.target.output, band_specs(self.bands),
            encoding=request.encoding, tags=self.tags(), overwrite=request.overwrite,
        )  # fmt: skip
        with writer:
            summary = self.predict_into(writer, progress, files.tif)
            writer.companions = lambda made, sha256: publish(self, made, sha256, summary)
        return Result(files, summary, self, sha256=writer.sha256)


def prepare(request: Request, *, dry_run: bool = False) -> Job:
    """Open, check and plan a request; cheap, and nothing is written.

    Args:
        dry_run: the job will only be told about, so its output may exist already.

    Raises:
        InputError (and its kinds): whatever in the request cannot be done, in one line.
    """
    files = _check_output(request, dry_run)
    parse_radiometry(request.radiometry)  # before a model is fetched for it
    model, model_name = load_named(request.model)
    source = open_source(request, model.config.gsd_m)
    aoi = request.area or source.area()
    if aoi is None:
        raise AreaError(
            "which area?",
            where=source.name,
            expected="--bbox, --bounds or --aoi with imagery of unknown extent",
        )
    notes = coverage_notes(source, aoi)
    target = choose_target(
        aoi,
        model.config.gsd_m,
        gsd_m=request.gsd,
        crs=request.crs,
        native=source.native_grid,
        native_crs=source.native_crs,
    )
    plan = plan_windows(target.predict, Lattice.of_model(model.config))
    extras = extras_of(request, model, aoi)
    choice = settle(model, request.backend, request.precision, request.device)
    runner = choice.open(model, extras.outputs)
    pace = seconds_per_crop(model, runner, request.batch_size, extras)
    cost = estimate(plan, target, pace, len(extras.bands), request.encoding)
    refuse_too_large(cost, request.max_pixels, aoi.describe(), in_memory=files is None)
    notes += [*choice.notes, *scale_notes(source.native_gsd_m, model.config.gsd_m)]
    model, radiometry, more = with_radiometry(model, source, aoi, request.radiometry)
    # Models need not be a `HeightModel`, and others know no stretch.
    stretch = getattr(model, "stretch", None)
    return Job(
        request, source, aoi, model, model_name, target, radiometry, extras,
        runner.with_radiometry(stretch) if stretch else runner,
        plan=plan, cost=cost, files=files, notes=notes + more,
    )  # fmt: skip


def _check_output(request: Request, dry_run: bool) -> output.OutputFiles | None:
    output.check_encoding(request.encoding, request.date_band)
    reader_count(request.workers)  # what is no number is told now
    if request.out is None:
        return None
    files = output.OutputFiles.of(request.out, request.quicklook)
    inputs = [*request.images, *([request.imagery] if request.imagery else [])]
    files.check(inputs, request.overwrite or dry_run)
    return files


def open_source(request: Request, gsd_m: float) -> ImagerySource:
    """The imagery, to be read at `gsd_m`: files, a named source or address, or the best one known here."""
    from canopy.sources.imagery import open_imagery

    if request.images and request.imagery:
        raise InputError("images and --imagery", expected="one of them", remedy="leave one of them out")
    what = request.imagery or request.images or _best_for(request.area)
    return open_imagery(
        what[0] if isinstance(what, tuple) and len(what) == 1 else what,
        area=request.area,
        bands=request.bands,
        nodata=request.nodata,
        crs=request.input_crs,
        scale=request.scale,
        datetime=request.datetime,
        gsd_m=gsd_m,
        # One CRS was named: for images that carry none it cannot have been meant for the map alone.
        fallback_crs=None if request.crs in ("image", "quadkey") else request.crs,
    )


def _best_for(area: AOI | None) -> str:
    """Name of the best known source that covers an area; says which it is."""
    from canopy.sources.manifest import best_source

    if area is None:
        raise InputError(
            "neither an image nor an area",
            expected="IMAGE files, --imagery NAME, or an area for which a source is known",
            remedy="see canopy predict --help",
        )
    best = best_source(area)
    if best is None:
        raise AreaError(
            "no named source covers the area",
            where=area.describe(),
            remedy="give IMAGE files, or --imagery with a STAC catalog or a tile template",
        )
    log.info(f"imagery: {best.name} ({best.title}), the best known source here")
    return best.name


def coverage_notes(source: ImagerySource, aoi: AOI) -> list[str]:
    """Warnings about imagery that does not reach everywhere; AreaError where there is none at all."""
    from canopy.sources.imagery import check_coverage

    check_coverage(source, aoi)
    notes = list(source.notes)
    if not source.covers(aoi):
        notes.append("the imagery covers only part of the area; the rest becomes nodata")
    return notes


def load_named(model: str | Path | HeightModel) -> tuple[HeightModel, str]:
    """The model and the name that tags give it."""
    from canopy.sources.weights import load_model

    name = None
    if isinstance(model, (str, Path)):
        name = Path(model).name
        model = load_model(model)
    return model, str(model.card.get("name") or name or "unnamed")
