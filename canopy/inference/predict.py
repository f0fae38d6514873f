"""`canopy.predict`: from imagery to a canopy height map, checked first (`prepare`), then run.

Nothing is written before `MapPrediction.run`, and nothing that can be known beforehand fails after it began.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import AreaError, InputError
from canopy.files import check_output, write_json
from canopy.geo.area import AOI
from canopy.geo.reading import raster_env
from canopy.inference import output
from canopy.inference.backends import Runner, settle
from canopy.inference.engine import RunSummary, Sink, predict_grid, reader_count
from canopy.inference.estimate import Estimate, estimate, refuse_too_large, seconds_per_crop
from canopy.inference.lattice import Lattice, Plan, plan_windows
from canopy.inference.layers import Extras, band_specs, extras_of
from canopy.inference.options import OneMapOptions, PredictOptions
from canopy.inference.output import MapFacts, map_item
from canopy.inference.predictor import resolve_batch
from canopy.inference.target import Target, choose_target, scale_notes
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


@dataclass(frozen=True)
class Prediction:
    """Imagery, area, model and grids of a map or of a region's tile, ready to be predicted.

    `runner` is the model on its runtime; without one it is torch, as the options have it. `readers` are the
    threads that read imagery ahead.
    """

    options: PredictOptions
    source: ImagerySource
    aoi: AOI
    model: HeightModel
    model_name: str
    target: Target
    radiometry: str = "none"
    extras: Extras = field(default_factory=Extras)
    runner: Runner | None = None
    readers: int | str = "auto"

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
        target = self.target
        how: dict[str, Any] = {
            "runner": self.runner, "batch_size": self.options.batch_size,
            "workers": self.readers, "progress": progress,
        }  # fmt: skip
        if not target.is_resampled:
            return predict_grid(
                self.model, self.source, target.predict, sink,
                aoi=self.aoi, extras=self.extras, **how,
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
class MapPrediction(Prediction):
    """A checked map. `notes` are warnings for the user; `cost` is what it will take."""

    options: OneMapOptions
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
            "precision": self.runner.precision if self.runner else self.options.precision,
            "imagery": output.imagery_text(self.source),
            "dates": output.dates_text(self.source.dates),
            "encoding": self.options.encoding,
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
        from canopy.geo.cog import CogWriter

        files, options = self.files, self.options
        if files is None:
            raise RuntimeError("no output was asked for")
        writer = CogWriter(
            files.tif, self.target.output, band_specs(self.bands),
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
            output.write_quicklook(
                files.tif,
                files.quicklook,
                title=f"Canopy height, {self.aoi.describe()}",
                subtitle=f"{output.bare_name(self.source.name)} ({output.dates_text(self.source.dates)}), "
                f"model {self.model_name}",
            )
        runtime = {"backend": self.runner.backend, "precision": self.runner.precision} if self.runner else {}
        facts = MapFacts(
            path=files.tif,
            sha256=sha256,
            grid=self.target.output,
            encoding=self.options.encoding,
            bands=self.bands,
            dates=self.source.dates,
            imagery=output.imagery_links(self.source),
            model={
                "name": self.model_name,
                "sha256": self.model_sha256,
                "licence": str(self.model.card.get("licence", "")),
                **runtime,
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
    files = _check_output(options, dry_run)
    parse_radiometry(options.radiometry)  # before a model is fetched for it
    area = area or options.area()
    model, model_name = load_named(model or options.model)
    if source is None or hasattr(source, "dims"):
        source = open_source(options, model.config.gsd_m, area, source)  # type: ignore[arg-type]
    aoi = area or source.area()
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
        gsd_m=options.gsd,
        crs=options.crs,
        native=source.native_grid,
        native_crs=source.native_crs,
    )
    plan = plan_windows(target.predict, Lattice.of_model(model.config))
    extras = extras_of(options, model, aoi)
    choice = settle(model, options.backend, options.precision, options.device)
    runner = choice.open(model, extras.outputs)
    resolve_batch(options.batch_size, runner.device.type)  # what is no number is told now
    pace = seconds_per_crop(model, runner)
    cost = estimate(plan, target, pace, len(extras.bands), options.encoding)
    refuse_too_large(cost, options.max_pixels, aoi.describe(), in_memory=files is None)
    notes += [*choice.notes, *scale_notes(source.native_gsd_m, model.config.gsd_m)]
    radiometry, more = "none", list[str]()
    if options.radiometry != "none":
        from canopy.inference.radiometry import with_radiometry

        model, radiometry, more = with_radiometry(model, source, aoi, options.radiometry)
    # Models need not be a `HeightModel`, and others know no stretch.
    stretch = getattr(model, "stretch", None)
    return MapPrediction(
        options=options, source=source, aoi=aoi, model=model, model_name=model_name, target=target,
        radiometry=radiometry, extras=extras, readers=options.workers,
        runner=runner.with_radiometry(stretch) if stretch else runner,
        plan=plan, cost=cost, files=files, notes=notes + more,
    )  # fmt: skip


def _check_output(options: OneMapOptions, dry_run: bool) -> output.OutputFiles | None:
    output.check_encoding(options.encoding, options.date_band)
    reader_count(options.workers)  # what is no number is told now
    if options.out is None:
        return None
    files = output.OutputFiles.of(options.out, options.quicklook)
    inputs = [options.images, options.imagery, options.aoi, options.model]
    check_output(files.all, inputs, overwrite=options.overwrite or dry_run)
    return files


def open_source(
    options: PredictOptions, gsd_m: float, area: AOI | None, array: xr.DataArray | None = None
) -> ImagerySource:
    """The imagery, to be read at `gsd_m`: an array, files, a named source or address, or the best known."""
    from canopy.imagery.open import open_imagery

    if options.images and options.imagery:
        raise InputError("images and --imagery", expected="one of them", remedy="leave one of them out")
    what: Any = array if array is not None else options.imagery or options.images or _best_for(area)
    return open_imagery(
        what[0] if isinstance(what, tuple) and len(what) == 1 else what,
        area=area,
        bands=options.bands,
        nodata=options.nodata,
        crs=options.input_crs,
        scale=options.scale,
        datetime=options.datetime,
        gsd_m=gsd_m,
        # One CRS was named: for images that carry none it cannot have been meant for the map alone.
        fallback_crs=None if options.crs in ("image", "quadkey") else options.crs,
    )


def _best_for(area: AOI | None) -> str:
    """Name of the best known source that covers an area; says which it is."""
    from canopy.imagery.named import best_source

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
    from canopy.imagery.base import check_coverage

    check_coverage(source, aoi)
    notes = list(source.notes)
    if not source.covers(aoi):
        notes.append("the imagery covers only part of the area; the rest becomes nodata")
    return notes


def load_named(model: str | Path | HeightModel) -> tuple[HeightModel, str]:
    """The model and the name that tags give it."""
    from canopy.models.registry import load_model

    name = None
    if isinstance(model, (str, Path)):
        name, model = Path(model).name, load_model(model)
    return model, str(model.card.get("name") or name or "unnamed")


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
