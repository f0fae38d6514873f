"""`canopy.predict`: from imagery to a canopy height map, checked first (`prepare`), then run.

Nothing is written before `MapPrediction.run`, and nothing that can be known beforehand fails after it began.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import AreaError
from canopy.files import check_output, write_json
from canopy.geo.area import AOI
from canopy.geo.cog import encoding_named
from canopy.geo.reading import raster_env
from canopy.inference import companions, output
from canopy.inference.backends import OVERHEAD_S_PER_PX, Runner, seconds_per_crop, settle
from canopy.inference.engine import RunSummary, Sink, predict_grid, reader_count, resolve_batch
from canopy.inference.inputs import coverage_notes, load_named, open_source, scale_notes, with_radiometry
from canopy.inference.lattice import Lattice, Plan, plan_windows
from canopy.inference.layers import Extras, band_specs, extras_of
from canopy.inference.options import OneMapOptions, PredictOptions
from canopy.inference.target import Target, choose_target
from canopy.models.height import parse_radiometry
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    import xarray as xr

    from canopy.imagery.base import ImagerySource
    from canopy.models.height import HeightModel


# What a resampled map's summary takes from the run that predicted; the rest counts the map's own pixels.
_OF_THE_NETWORK = (
    "windows", "crops", "crops_predicted", "batch_size", "model_seconds", "black_share", "notes"
)  # fmt: skip
# Holes that nobody declared are pure black far more often than shadows are.
BLACK_SHARE = 0.005
# Without a file the map is held in memory.
MAX_PIXELS_IN_MEMORY = 400_000_000


@dataclass(frozen=True)
class Prediction:
    """Imagery, area, model and grids of a map or of a region's tile, ready to be predicted.

    `runner` is the model on its runtime; `readers` are the threads that read imagery ahead.
    """

    options: PredictOptions
    source: ImagerySource
    aoi: AOI
    model: HeightModel
    model_name: str
    target: Target
    runner: Runner
    radiometry: str = "none"
    extras: Extras = field(default_factory=Extras)
    readers: int | str = "auto"

    @property
    def model_sha256(self) -> str:
        return self.model.sha256 or "unsaved"

    @property
    def licence(self) -> str:
        """Of the model, as its card says."""
        return str(self.model.card.get("licence", ""))

    def tags(self, scenes: output.Scenes | None = None) -> dict[str, str]:
        """Tags of the GeoTIFF; no wall-clock time and no folders. `scenes`: those in it, if not all."""
        gsd_m = self.target.output.gsd_m
        tags = output.map_tags(
            scenes or output.Scenes.of(self.source), self.model_name, self.model_sha256, gsd_m, self.licence
        )
        tags |= output.extra_tags(self.extras, self.model.card)
        tags |= {"CANOPY_BACKEND": self.runner.backend, "CANOPY_PRECISION": self.runner.precision}
        return tags | ({"CANOPY_RADIOMETRY": self.radiometry} if self.radiometry != "none" else {})

    def predict_into(self, sink: Sink, progress: Progress | None, out: Path | None = None) -> RunSummary:
        """Predict into `sink`, by way of a scratch file beside `out` where the output has another grid."""
        target = self.target
        how: dict[str, Any] = {
            "batch_size": self.options.batch_size, "workers": self.readers, "progress": progress
        }  # fmt: skip
        if not target.is_resampled:
            return predict_grid(
                self.runner, self.source, target.predict, sink, aoi=self.aoi, extras=self.extras, **how
            )
        from canopy.inference.regrid import Scratch, regrid

        # Beside the output: the system's temporary folder is often small, or memory.
        beside = out.absolute().parent if out else None
        prefix = f".{out.name}.canopy-" if out else ".canopy-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as folder:
            path = Path(folder) / "predicted.tif"
            with closing(Scratch(path, target.predict, self.extras.layers)) as scratch:
                run = predict_grid(
                    self.runner, self.source, target.predict, scratch,
                    aoi=target.reach(self.aoi), extras=replace(self.extras, raw=True), **how,
                )  # fmt: skip
            final = regrid(
                path, target.output, sink, self.source,
                aoi=self.aoi, extras=self.extras, progress=progress,
            )  # fmt: skip
        return replace(final, **{name: getattr(run, name) for name in _OF_THE_NETWORK})


@dataclass(frozen=True)
class Result:
    """What came out. `data` is the map where it was kept in memory, else None."""

    files: output.OutputFiles | None
    summary: RunSummary
    job: MapPrediction
    sha256: str | None = None
    data: xr.DataArray | None = None

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
            "crops_predicted": summary.crops_predicted,
            "batch_size": summary.batch_size,
            "seconds": round(summary.seconds, 3),
            "model_seconds": round(summary.model_seconds, 3),
            "notes": [*self.job.notes, *summary.notes],
        }


@dataclass(frozen=True, kw_only=True)
class MapPrediction(Prediction):
    """A checked map. `seconds` is about what it will take, `notes` are warnings for the user."""

    options: OneMapOptions
    plan: Plan
    seconds: float
    files: output.OutputFiles | None
    notes: list[str] = field(default_factory=list)

    @property
    def gigabytes(self) -> float:
        """Of the map, uncompressed."""
        grid, stored = self.target.output, np.dtype(encoding_named(self.options.encoding).dtype)
        return grid.height * grid.width * len(self.extras.bands) * stored.itemsize / 1e9

    @property
    def dates(self) -> str:
        return output.dates_text(self.source.dates)

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
            "backend": self.runner.backend,
            "precision": self.runner.precision,
            "imagery": output.imagery_text(output.Scenes.of(self.source)),
            "dates": self.dates,
            "imagery_terms": terms.model_dump() if (terms := self.source.terms) else None,
            "commercial_use": output.commercial_use(terms, self.licence)[0],
            "encoding": self.options.encoding,
            "radiometry": self.radiometry,
            "tiles": len(self.plan),
            "crops": self.plan.n_crops,
            "gigabytes": self.gigabytes,
            "estimated_seconds": self.seconds,
        }

    def describe(self) -> list[str]:
        """What is about to happen, for a person: the area line first."""
        grid = self.target.output
        crs = f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else "the image's CRS"
        return [
            f"{self.aoi.describe()}, {_cost_text(self.plan, self.seconds)}",
            f"imagery {output.bare_name(self.source.name)} ({self.dates}); model {self.model_name} "
            f"({self.model_sha256[:12]}) in {self.runner.backend} {self.runner.precision}",
            f"map of {grid.width} x {grid.height} px, {grid.gsd_m:.3g} m, {crs}",
            output.commercial_use(self.source.terms, self.licence)[1],
        ]

    def run(self, progress: Progress | None = None) -> Result:
        """Predict and write.

        Raises:
            CanopyError: nothing is left at the output's place then.
        """
        started = time.perf_counter()
        with raster_env():
            if self.files:
                result = self._to_files(self.files, progress)
            else:
                sink = output.ArraySink(self.target.output, self.extras.bands)
                summary = self.predict_into(sink, progress)
                result = Result(None, summary, self, data=sink.to_xarray(self.tags()))
        result.summary.seconds = time.perf_counter() - started
        if not result.summary.valid_pixels:
            self._tell(result, "no pixel has a height: the imagery has none that is valid there")
        if result.summary.black_share >= BLACK_SHARE:
            self._tell(
                result,
                f"{100 * result.summary.black_share:.1f} % of the pixels with heights are pure black "
                "(0, 0, 0), which cameras hardly record; if there is no image there, give --nodata 0",
            )
        return result

    @staticmethod
    def _tell(result: Result, note: str) -> None:
        log.warning(f"note: {note}")
        result.summary.notes.append(note)

    def _to_files(self, files: output.OutputFiles, progress: Progress | None) -> Result:
        from canopy.geo.cog import CogWriter

        options = self.options
        writer = CogWriter(
            files.tif, self.target.output, band_specs(self.extras.bands),
            encoding=options.encoding, tags=self.tags(), overwrite=options.overwrite,
        )  # fmt: skip
        with writer:
            summary = self.predict_into(writer, progress, files.tif)
            writer.companions = lambda made, sha256: self._publish(made, sha256, summary)
        return Result(files, summary, self, sha256=writer.sha256)

    def _publish(self, made: Path, sha256: str, summary: RunSummary) -> list[str]:
        """Write the quicklook, if one was asked for, and the STAC item beside a finished map; their names.

        `made` is the map under its own name, though not yet in its place (see `CogWriter.companions`).
        """
        files = output.OutputFiles.of(made, self.options.quicklook)
        if files.quicklook is not None:
            companions.write_quicklook(
                files.tif,
                files.quicklook,
                title=f"Canopy height, {self.aoi.describe()}",
                subtitle=f"{output.bare_name(self.source.name)} ({self.dates}), model {self.model_name}"
                + (f"\nimagery: {self.source.terms.text}" if self.source.terms else ""),
            )
        item = companions.map_item(
            files.tif,
            self.target.output,
            sha256=sha256,
            encoding=self.options.encoding,
            bands=self.extras.bands,
            scenes=output.Scenes.of(self.source),
            model=companions.model_facts(self.model, self.model_name, self.runner),
            statistics={
                "mean": summary.mean_height_m,
                "maximum": summary.max_height_m,
                "valid_percent": 100 * summary.valid_fraction,
            },
            quicklook=files.quicklook,
        )
        write_json(files.item, item)
        return [path.name for path in files.all[1:]]


def prepare(
    options: OneMapOptions,
    *,
    area: AOI | None = None,
    model: HeightModel | None = None,
    source: ImagerySource | xr.DataArray | None = None,
    dry_run: bool = False,
) -> MapPrediction:
    """Open, check and plan a map; cheap, and nothing is written.

    Args:
        area, model, source: stand in for the area, model and imagery that the options name; a source may be
            an array with a CRS.
        dry_run: the map will only be told about, so its output may exist already.

    Raises:
        InputError (and its kinds): whatever in the options cannot be done, in one line.
    """
    files = _check_options(options, dry_run)
    area = area or options.area()
    model, model_name = load_named(model or options.model)
    gsd_m = model.config.gsd_m
    if source is None or hasattr(source, "dims"):
        source = open_source(options, gsd_m, area, source)  # type: ignore[arg-type]
    aoi = area or source.area()
    if aoi is None:
        raise AreaError(
            "which area?",
            where=source.name,
            expected="--bbox, --bounds or --aoi with imagery of unknown extent",
        )
    notes = coverage_notes(source, aoi)
    target = choose_target(
        aoi, gsd_m, gsd_m=options.gsd, crs=options.crs,
        native=source.native_grid, native_crs=source.native_crs,
    )  # fmt: skip
    plan = plan_windows(target.predict, Lattice.of_model(model.config))
    extras = extras_of(options, model, aoi)
    choice = settle(model, options.backend, options.precision, options.device)
    model, radiometry, more = with_radiometry(model, source, aoi, options.radiometry)
    runner = choice.open(model, extras.outputs)
    pixels = sum(grid.height * grid.width for grid in (target.output, target.predict))
    job = MapPrediction(
        options=options, source=source, aoi=aoi, model=model, model_name=model_name, target=target,
        radiometry=radiometry, extras=extras, readers=options.workers, runner=runner, plan=plan, files=files,
        seconds=plan.n_crops * seconds_per_crop(model, runner) + OVERHEAD_S_PER_PX * pixels,
        notes=[*notes, *choice.notes, *scale_notes(source.native_gsd_m, gsd_m), *more],
    )  # fmt: skip
    _refuse_too_large(job)
    return job


def _check_options(options: OneMapOptions, dry_run: bool) -> output.OutputFiles | None:
    """Refuse what can be known to be wrong before a model is fetched for it; the names of the outputs."""
    output.check_encoding(options.encoding, options.date_band)
    parse_radiometry(options.radiometry)
    reader_count(options.workers)
    resolve_batch(options.batch_size, "cpu")
    if options.out is None:
        return None
    files = output.OutputFiles.of(options.out, options.quicklook)
    inputs = [options.images, options.imagery, options.aoi, options.model]
    check_output(
        files.all, inputs, overwrite=options.overwrite or dry_run,
        expected="a file name ending in .tif", suffixes=(".tif", ".tiff"),
    )  # fmt: skip
    return files


def _refuse_too_large(job: MapPrediction) -> None:
    """Raises AreaError for a map that is larger than allowed, with what it would take."""
    mapped, predicted = (grid.height * grid.width for grid in (job.target.output, job.target.predict))
    limit, remedy = job.options.max_pixels, "choose a smaller area, or raise --max-pixels"
    if max(mapped, predicted) <= limit:
        if job.files is not None or mapped <= MAX_PIXELS_IN_MEMORY:
            return
        limit = MAX_PIXELS_IN_MEMORY
        remedy = "give `out` a file name: a map of this size is not held in memory"
    raise AreaError(
        f"the area is too large: {max(mapped, predicted):,} px, {job.gigabytes:.1f} GB, "
        f"{_cost_text(job.plan, job.seconds)}",
        where=job.aoi.describe(),
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
