"""`canopy.predict`: from imagery to a canopy height map, checked first (`prepare`), then run.

Nothing is written before `Prediction.run`, and nothing that can be known beforehand fails after it began. A
region's tile is a map like any other.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import AreaError
from canopy.files import check_output, write_json
from canopy.geo.area import AOI
from canopy.geo.cog import encoding_named
from canopy.geo.reading import raster_env
from canopy.geo.style import ramp_style
from canopy.inference import output
from canopy.inference.backends import OVERHEAD_S_PER_PX, Runner, seconds_per_crop
from canopy.inference.engine import RunSummary, Sink, predict_grid, reader_count
from canopy.inference.inputs import Inputs, Target, check_options, choose_target, open_inputs, open_source
from canopy.inference.lattice import Lattice, Plan, plan_windows
from canopy.inference.layers import UNJUDGED, band_specs, findings, told, top_of_range
from canopy.inference.options import OneMapOptions
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    import xarray as xr

    from canopy.imagery.base import ImagerySource
    from canopy.models.height import HeightModel


# Holes that nobody declared are pure black far more often than shadows are.
BLACK_SHARE = 0.005
# Without a file the map is held in memory.
MAX_PIXELS_IN_MEMORY = 400_000_000


class _Empty(Exception):  # noqa: N818  (a signal, not an error)
    """Nothing valid in a map: its file is not kept."""


@dataclass(frozen=True)
class Result:
    """What came out. `data` is the map where it was kept in memory, `sha256` that of a file."""

    job: Prediction
    summary: RunSummary
    files: output.OutputFiles | None = None
    sha256: str | None = None
    data: xr.DataArray | None = None

    @property
    def findings(self) -> dict[str, float]:
        """What the map should be known by, as shares of it; see `layers.findings`."""
        return findings(self.summary.judged, self.summary.tall, self.job.inputs.extras)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: files, statistics, times, and what was used."""
        files, summary, known = self.files, self.summary, self.summary.valid_pixels > 0
        return {
            "output": str(files.tif) if files else None,
            "stac_item": str(files.item) if files else None,
            "quicklook": str(files.quicklook) if files and files.quicklook else None,
            "sha256": self.sha256,
            **self.job.to_dict(),
            "mean_height_m": summary.mean_height_m if known else None,
            "max_height_m": summary.max_height_m if known else None,
            "cover_2m": summary.cover_2m if known else None,
            "valid_fraction": summary.valid_fraction,
            "findings": self.findings,
            "crops_predicted": summary.crops_predicted,
            "batch_size": summary.batch_size,
            "seconds": round(summary.seconds, 3),
            "model_seconds": round(summary.model_seconds, 3),
            "notes": [*self.job.inputs.notes, *summary.notes],
        }


@dataclass(frozen=True)
class Prediction:
    """A map that is ready to be made: what it is made of, its grids, the model on its runtime.

    Attributes:
        files: where it goes; None for memory.
        readers: threads that read imagery ahead.
        batch_size: crops at a time; of the options by default.
    """

    inputs: Inputs
    target: Target
    runner: Runner
    files: output.OutputFiles | None = None
    overwrite: bool = False
    readers: int | str = "auto"
    batch_size: int | str = "auto"

    @property
    def notes(self) -> tuple[str, ...]:
        return self.inputs.notes

    @cached_property
    def plan(self) -> Plan:
        return plan_windows(self.target.predict, Lattice.of_model(self.inputs.model.config))

    @cached_property
    def scenes(self) -> output.Scenes:
        return output.Scenes.of(self.inputs.source, self.target.output)

    @cached_property
    def seconds(self) -> float:
        """About what it will take."""
        pixels = sum(grid.height * grid.width for grid in (self.target.output, self.target.predict))
        crop_s = seconds_per_crop(self.inputs.model, self.runner)
        return self.plan.n_crops * crop_s + OVERHEAD_S_PER_PX * pixels

    @property
    def gigabytes(self) -> float:
        """Of the map, uncompressed."""
        grid, stored = self.target.output, np.dtype(encoding_named(self.inputs.options.encoding).dtype)
        return grid.height * grid.width * len(self.inputs.extras.bands) * stored.itemsize / 1e9

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the GeoTIFF; no wall-clock time and no folders."""
        made, model = self.inputs, self.inputs.model
        tags = output.map_tags(
            self.scenes, made.model_name, model.sha256 or "unsaved", self.target.output.gsd_m, made.licence
        ) | output.extra_tags(made.extras, model.card)
        tags |= {"CANOPY_BACKEND": self.runner.backend, "CANOPY_PRECISION": self.runner.precision}
        return tags | ({"CANOPY_RADIOMETRY": made.radiometry} if made.radiometry != "none" else {})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready facts that are known before the run."""
        grid, made = self.target.output, self.inputs
        return {
            "area": made.aoi.describe(),
            "bounds": list(grid.bounds),
            "crs": f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else grid.crs.to_wkt(),
            "width": grid.width,
            "height": grid.height,
            "gsd_m": grid.gsd_m,
            "model": made.model_name,
            "model_sha256": made.model.sha256 or "unsaved",
            "backend": self.runner.backend,
            "precision": self.runner.precision,
            "imagery": output.imagery_text(self.scenes),
            "dates": output.dates_text(self.scenes.dates),
            "imagery_terms": terms.model_dump() if (terms := made.source.terms) else None,
            "commercial_use": output.commercial_use(terms, made.licence)[0],
            "encoding": made.options.encoding,
            "radiometry": made.radiometry,
            "tiles": len(self.plan),
            "crops": self.plan.n_crops,
            "gigabytes": self.gigabytes,
            "estimated_seconds": self.seconds,
        }

    def describe(self) -> list[str]:
        """What is about to happen, for a person: the area line first."""
        grid, facts = self.target.output, self.to_dict()
        crs = facts["crs"] if grid.crs.epsg else "the image's CRS"
        return [
            f"{facts['area']}, {_cost_text(self.plan, self.seconds)}",
            f"imagery {output.bare_name(self.inputs.source.name)} ({facts['dates']}); model {facts['model']} "
            f"({facts['model_sha256'][:12]}) in {facts['backend']} {facts['precision']}",
            f"map of {grid.width} x {grid.height} px, {grid.gsd_m:.3g} m, {crs}",
            output.commercial_use(self.inputs.source.terms, self.inputs.licence)[1],
        ]

    def run(self, progress: Progress | None = None, keep_empty: bool = True) -> Result:
        """Predict and write.

        Args:
            keep_empty: also write a map without any height; the result has no `files` otherwise.

        Raises:
            CanopyError: nothing is left at the output's place then.
        """
        from canopy.geo.cog import CogWriter

        started, made = time.perf_counter(), self.inputs
        with raster_env():
            if self.files is None:
                sink = output.ArraySink(self.target.output, made.extras.bands)
                result = Result(self, self._predict_into(sink, progress), data=sink.to_xarray(self.tags))
                self._note(result)
            else:
                with suppress(_Empty), CogWriter(
                    self.files.tif, self.target.output, band_specs(made.extras.bands),
                    encoding=made.options.encoding, tags=self.tags, overwrite=self.overwrite,
                    style=ramp_style(0.0, top_of_range(made.extras.tallest_m)) if keep_empty else "",
                ) as writer:  # fmt: skip
                    result = Result(self, self._predict_into(writer, progress))
                    if not (keep_empty or result.summary.valid_pixels):
                        raise _Empty
                    result = replace(result, files=self.files)
                    # Of a region's tiles all is told together.
                    self._note(result, log.warning if keep_empty else log.debug)
                    writer.companions = lambda path, sha256: self._publish(path, sha256, result)
                result = replace(result, sha256=writer.sha256)
        result.summary.seconds = time.perf_counter() - started
        return result

    def _predict_into(self, sink: Sink, progress: Progress | None) -> RunSummary:
        """Predict into `sink`, by way of a scratch file beside it where the output has another grid."""
        made, target = self.inputs, self.target
        resampled = target.predict != target.output

        def predict(sink: Sink) -> RunSummary:
            return predict_grid(
                self.runner, made.source, target.predict, sink,
                aoi=target.reach(made.aoi) if resampled else made.aoi,
                extras=replace(made.extras, raw=resampled), batch_size=self.batch_size,
                workers=self.readers, progress=progress,
            )  # fmt: skip

        if not resampled:
            return predict(sink)
        from canopy.inference.regrid import Scratch, regrid

        # Beside the output: the system's temporary folder is often small, or memory.
        beside = self.files.tif.absolute().parent if self.files else None
        prefix = f".{self.files.tif.name}.canopy-" if self.files else ".canopy-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as folder:
            path = Path(folder) / "predicted.tif"
            with closing(Scratch(path, target.predict, made.extras.layers)) as scratch:
                summary = predict(scratch)
            regrid(
                path, target.output, sink, made.source, summary,
                aoi=made.aoi, extras=made.extras, progress=progress,
            )  # fmt: skip
        return summary

    def _note(self, result: Result, say: Callable[[str], None] = log.warning) -> None:
        """What the imagery turned out to be, for the user."""
        summary = result.summary
        black = summary.black_pixels / max(summary.seen_pixels, 1)
        if not summary.valid_pixels:
            summary.notes.append("no pixel has a height: the imagery has none that is valid there")
        summary.notes += told(result.findings, self.inputs.extras)
        if black >= BLACK_SHARE:
            summary.notes.append(
                f"{100 * black:.1f} % of the pixels with heights are pure black (0, 0, 0), which cameras "
                "hardly record; if there is no image there, give --nodata 0"
            )
        for note in summary.notes:
            (log.info if note == UNJUDGED else say)(f"note: {note}")

    def _publish(self, path: Path, sha256: str, result: Result) -> list[str]:
        """Write picture and STAC item beside a finished map; their names.

        `path` is the map under its own name, though not yet in its place (see `CogWriter.companions`).
        """
        made, summary = self.inputs, result.summary
        assert self.files is not None
        files = output.OutputFiles.of(path, self.files.quicklook is not None)
        item = output.map_item(
            path,
            self.target.output,
            sha256=sha256,
            encoding=made.options.encoding,
            bands=made.extras.bands,
            scenes=self.scenes,
            model={
                "name": made.model_name,
                "sha256": made.model.sha256 or "unsaved",
                "licence": made.licence,
                "backend": self.runner.backend,
                "precision": self.runner.precision,
            },
            statistics={
                "mean": summary.mean_height_m,
                "maximum": summary.max_height_m,
                "valid_percent": 100 * summary.valid_fraction,
            },
            findings=result.findings,
            quicklook=files.quicklook,
        )
        if files.quicklook is not None:
            from canopy.inference.picture import draw_map

            draw_map(files.tif, files.quicklook, made, self.scenes, result.findings)
        write_json(files.item, item)
        return [one.name for one in files.all[1:]]


def prepare(
    options: OneMapOptions,
    *,
    area: AOI | None = None,
    model: HeightModel | None = None,
    source: ImagerySource | xr.DataArray | None = None,
    dry_run: bool = False,
) -> Prediction:
    """Open, check and plan a map; cheap, and nothing is written.

    Args:
        area, model, source: stand in for the area, model and imagery that the options name; a source may be
            an array with a CRS.
        dry_run: the map will only be told about, so its output may exist already.

    Raises:
        InputError (and its kinds): whatever in the options cannot be done, in one line.
    """
    check_options(options)
    reader_count(options.workers)
    files = None
    if options.out is not None:
        files = output.OutputFiles.of(options.out, options.quicklook)
        check_output(
            [*files.all, files.tif.with_suffix(".qml")],
            [options.images, options.imagery, options.aoi, options.model],
            overwrite=options.overwrite or dry_run,
            expected="a file name ending in .tif", suffixes=(".tif", ".tiff"),
        )  # fmt: skip

    def opener(gsd_m: float, area: AOI | None) -> tuple[ImagerySource, bool]:
        if source is not None and not hasattr(source, "dims"):
            return source, True
        return open_source(options, gsd_m, area, source), True  # type: ignore[arg-type]

    made = open_inputs(options, area=area, model=model, opener=opener)
    target = choose_target(
        made.aoi, made.model.config.gsd_m, gsd_m=options.gsd, crs=options.crs,
        native=made.source.native_grid, native_crs=made.source.native_crs,
    )  # fmt: skip
    runner = made.choice.open(made.model, made.extras.outputs)
    job = Prediction(made, target, runner, files, options.overwrite, options.workers, options.batch_size)
    _refuse_too_large(job, options.max_pixels)
    return job


def _refuse_too_large(job: Prediction, limit: int) -> None:
    """Raises AreaError for a map that is larger than allowed, with what it would take."""
    mapped, predicted = (grid.height * grid.width for grid in (job.target.output, job.target.predict))
    remedy = "choose a smaller area, or raise --max-pixels"
    if max(mapped, predicted) <= limit:
        if job.files is not None or mapped <= MAX_PIXELS_IN_MEMORY:
            return
        limit = MAX_PIXELS_IN_MEMORY
        remedy = "give `out` a file name: a map of this size is not held in memory"
    raise AreaError(
        f"the area is too large: {max(mapped, predicted):,} px, {job.gigabytes:.1f} GB, "
        f"{_cost_text(job.plan, job.seconds)}",
        where=job.inputs.aoi.describe(),
        expected=f"at most {limit:,} px",
        remedy=remedy,
    )


def _cost_text(plan: Plan, seconds: float) -> str:
    """`61 tiles, ~3 min`; minutes are the finest that such a guess deserves."""
    hours = seconds / 3600
    about = f"~{seconds / 60:.0f} min" if hours < 2 else f"~{hours:.0f} h"
    if hours >= 72:
        about = f"~{hours / 24:,.0f} days"
    tiles = f"{len(plan):,} tile{'' if len(plan) == 1 else 's'}"
    return f"{tiles}, {about if seconds >= 60 else 'under 1 min'}"


def predict(
    image: str | Path | Sequence[str | Path] | xr.DataArray | ImagerySource | None = None,
    *,
    model: str | Path | HeightModel = "default",
    area: AOI | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> xr.DataArray | Path:
    """Map canopy height.

    Args:
        image: one or several image files, directories or URLs; a DataArray (band, y, x) with a CRS, as
            rioxarray opens it; what `canopy.open_imagery` gives; or nothing, with the option `imagery`.
        model: a model's name or file, or a `HeightModel`.
        area: an `AOI`; or one of the options `bbox` (LAT,LON with `size_m`, or LAT,LON,LAT,LON), `bounds`
            (W,S,E,N in `bounds_crs`) and `aoi` (a vector file). By default all of the imagery.
        options: those of `canopy predict` under the same names, see
            `canopy.inference.options.OneMapOptions`; with `out`, a GeoTIFF is written, with its STAC item
            (and picture) beside it.

    Returns:
        Without `out`, a DataArray (y, x) of metres, NaN where there is no height, with its CRS for rioxarray;
        (band, y, x) with `date_band`. With `out`, its path.

    Raises:
        InputError: whatever cannot be done as asked; nothing was written.

    >>> import canopy
    >>> chm = canopy.predict("image.tif")  # doctest: +SKIP
    """
    named = isinstance(model, (str, Path))
    given = dict(options) | ({"model": model} if named else {})
    source = None
    if image is not None and isinstance(image, (str, Path, Sequence)):
        images = [image] if isinstance(image, (str, Path)) else image
        given["images"] = tuple(str(one) for one in images)
    else:
        source = image
    job = prepare(
        OneMapOptions.of(given, "canopy.predict"),
        area=area,
        model=None if named else model,  # type: ignore[arg-type]
        source=source,
    )
    for note in job.notes:
        log.warning(note)
    result = job.run(progress)
    return result.files.tif if result.files else result.data  # type: ignore[return-value]
