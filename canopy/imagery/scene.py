"""One image of a mosaic: a raster file or URL, or three of one colour each, opened on first need.

A scene knows its place, its bands and its white from the file's header. Pixels come through the one warped
reader; remote files are retried here, because only the application can see why a host failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window
from shapely.geometry import MultiPolygon, Polygon

from canopy.config import Settings
from canopy.errors import AreaError, FetchError, ImageryError, InputError
from canopy.files import host_of, is_url, public_name
from canopy.geo.collar import Collar, find_collar
from canopy.geo.crs import ground_crs, to_crs, to_lonlat
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import check_georeference, gdal_complaints, open_raster, read_native, read_window
from canopy.imagery.bands import (
    BandPlan,
    check_local,
    check_nodata,
    collar_notes,
    no_colour,
    pixel_notes,
    plan_bands,
)
from canopy.imagery.base import ReadOptions, as_colour
from canopy.imagery.dates import acquisition_date

if TYPE_CHECKING:
    from canopy.web import Signer

Pixels = tuple[NDArray[np.float32], NDArray[np.bool_]]
Outline: TypeAlias = Polygon | MultiPolygon
OPEN_FILES_PER_THREAD = 24
T = TypeVar("T")


class SceneRecord(Settings):
    """What is known of an image; all that a pinned source keeps of it.

    Attributes:
        scene_id: for messages and tags.
        assets: one href (RGB) or three (red, green, blue), absolute, unsigned.
        day: acquisition day, or None.
        wkt: its outline in EPSG:4326, or None: only the file knows.
        bands: band numbers of red, green, blue in the one asset, when a catalog says.
        hidden: lies wholly under the outlines of images above it: read only where those have no pixels.
        cloud: per cent of it, as a catalog states.
        gsd_m: ground sample distance, as a catalog or the file states.
    """

    scene_id: str
    assets: tuple[str, ...]
    day: date | None = None
    wkt: str | None = None
    bands: tuple[int, int, int] | None = None
    hidden: bool = False
    cloud: float = 0.0
    gsd_m: float | None = None

    @cached_property
    def outline(self) -> Outline | None:
        """Polygons in EPSG:4326."""
        return shapely.from_wkt(self.wkt) if self.wkt else None


class Handles:
    """Open datasets of one source: each thread has its own, since GDAL's may not be shared."""

    def __init__(self) -> None:
        self._here = threading.local()

    def get(self, url: str) -> DatasetReader:
        """This thread's dataset of a file; the least recently used is let go of when there are many."""
        if not hasattr(self._here, "open"):
            self._here.open = lru_cache(OPEN_FILES_PER_THREAD)(partial(open_raster, georeferenced=False))
        return self._here.open(url)

    def drop(self) -> None:
        """Let go of this thread's datasets: what GDAL gives after it has failed is not to be trusted."""
        vars(self._here).clear()

    def close(self) -> None:
        """Let go of the datasets of all threads."""
        self._here = threading.local()


@dataclass(frozen=True)
class SceneFacts:
    """What a raster's header says.

    Attributes:
        place: affine, CRS and shape, of any orientation.
        plan: bands and scaling.
        collar: of an image that was compressed with loss.
        notes: warnings for the user.
    """

    place: SourcePlace
    plan: BandPlan
    collar: Collar | None
    notes: tuple[str, ...]

    def frame(self) -> Polygon:
        """The image's edge in its own CRS."""
        return Polygon([self.place.xy(*corner) for corner in self.place.corners_rc])


class Scene:
    """A raster file or URL as one image of a mosaic, or three of one colour each. Thread-safe.

    Attributes:
        record: what is known of it; once it was opened, also what only the file knows.
    """

    def __init__(
        self, record: SceneRecord, options: ReadOptions, handles: Handles, sign: Signer | None = None
    ) -> None:
        """Describe an image without opening it.

        Args:
            record: what is known of it.
            options: how to read it; bands that nobody named are the record's.
            handles: where open files are kept.
            sign: turns its hrefs into URLs that may be read now.
        """
        if options.bands is None:
            options = replace(options, bands=record.bands)
        self.record, self._options, self._handles, self._sign = record, options, handles, sign
        self._facts: dict[str, SceneFacts] = {}
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether its (first) file was opened, so that `facts` are known."""
        return self.record.assets[0] in self._facts

    @property
    def facts(self) -> SceneFacts:
        """Header facts of its (first) file; opens it the first time.

        Raises:
            ImageryError: it cannot be read as RGB in a known place; FetchError when its host fails.
        """
        return self._facts_of(self.record.assets[0])

    def check(self) -> None:
        """Open it; of a file of this machine, read the last pixel, which one that was cut short lacks.

        Raises:
            ImageryError: it cannot be read; see `facts`.
        """
        href, plan = self.record.assets[0], self.facts.plan
        if not is_url(href):
            self._try(
                href,
                lambda ds: read_native(
                    ds, plan.indexes, Window(ds.width - 1, ds.height - 1, 1, 1), None, colours=True
                ),
            )

    def read(self, grid: Grid) -> Pixels:
        """RGB in 0..1 and validity on `grid`; of three files, a pixel needs all."""
        parts = [self._read(href, grid) for href in self.record.assets]
        if len(parts) == 1:
            return parts[0]
        valid = np.logical_and.reduce([good for _, good in parts])
        return np.where(valid, np.concatenate([values for values, _ in parts]), np.float32(0)), valid

    def pixel_notes(self) -> list[str]:
        """Warnings about what a look at a few pixels shows: no colour, all black, an undeclared border.

        Damaged pixels are no error before they are asked for, and one band alone says nothing of colour.
        """
        if len(self.record.assets) > 1:
            return []
        href, facts, label = self.record.assets[0], self.facts, self.record.scene_id

        def look(dataset: DatasetReader) -> list[str]:
            try:
                notes = pixel_notes(dataset, facts.plan, label)
                if facts.collar is None:
                    notes += collar_notes(dataset, facts.plan, label, self._options.nodata)
                return notes
            except RasterioError:
                self._handles.drop()
                return []

        return self._try(href, look)

    def _read(self, href: str, grid: Grid) -> Pixels:
        facts, nodata = self._facts_of(href), self._options.nodata
        plan = facts.plan
        decode = partial(_expand, plan.palette) if plan.palette is not None else None
        if decode is None and len(plan.indexes) == 3:
            decode = partial(_with_colour, plan.divisor)

        def pixels(dataset: DatasetReader) -> tuple[np.ndarray, np.ndarray]:
            return read_window(
                dataset, grid, plan.indexes, nodata=nodata, crs=facts.place.crs, decode=decode, colours=True,
                collar=facts.collar, overviews=bool(self._options.overviews),
            )  # fmt: skip

        values, valid = self._try(href, pixels)
        return as_colour(values, valid, plan.divisor), valid

    def _facts_of(self, href: str) -> SceneFacts:
        with self._lock:
            if href not in self._facts:
                found = self._try(href, partial(self._study, href))
                if isinstance(found, InputError):
                    raise found
                self._facts[href] = found
            return self._facts[href]

    def _study(self, href: str, dataset: DatasetReader) -> SceneFacts | InputError:
        """Facts, or the reason why this image will never do (returned, so that no retry is spent on it)."""
        label, options = self.record.scene_id, self._options
        try:
            check_local(dataset, label)
            check_georeference(dataset, label)
            place = _place(dataset, options, label)
            single = len(self.record.assets) > 1
            plan = plan_bands(dataset, where=label, bands=options.bands, scale=options.scale, single=single)
            check_nodata(dataset, plan, options.nodata, label)
            collar = None
            if len(plan.indexes) == 3:
                with gdal_complaints() as complaints:
                    collar = find_collar(dataset, plan.indexes, plan.divisor, options.nodata)
                if complaints:
                    raise RasterioError(complaints[0])
        except InputError as error:
            return error
        except RasterioError as error:
            raise ImageryError(f"unreadable pixels ({error})", where=label) from error
        notes = list(plan.notes)
        if dataset.crs and options.crs and place.crs != to_crs(dataset.crs.to_wkt()):
            notes.append(f"{label}: --input-crs {options.crs} in place of the CRS that it carries")
        if collar:
            notes.append(
                f"{label}: a border of {collar.value} in an image compressed with loss: it is missing, "
                f"and so are pixels beside it that differ from {collar.value} by {collar.near} or less"
            )
        facts, record = SceneFacts(place, plan, collar, tuple(notes)), self.record
        try:
            wkt = record.wkt or to_lonlat(facts.frame(), place.crs).wkt
        except AreaError as error:
            return ImageryError(f"lies outside the domain of its CRS ({error.what})", where=label)
        day = record.day or acquisition_date(dataset.tags(), public_name(href))
        gsd_m = record.gsd_m or place.gsd_m
        self.record = record.model_copy(update={"day": day, "wkt": wkt, "gsd_m": gsd_m})
        return facts

    def _try(self, href: str, work: Callable[[DatasetReader], T]) -> T:
        """Run `work` on this thread's handle; for remote rasters again after failures that may pass."""
        if not is_url(href):
            try:
                return work(self._handles.get(href))
            except ImageryError:
                self._handles.drop()
                raise
        from canopy import web

        def one_try(fresh: bool) -> T:
            url = self._sign(href, fresh) if self._sign else href
            try:
                with rasterio.Env(**web.gdal_options(url)):
                    return work(self._handles.get(url))
            except FetchError:
                raise
            except ImageryError as error:
                self._handles.drop()
                # What GDAL says of a host is not enough to tell whether another try can help.
                web.diagnose(url, signed=self._sign is not None)
                raise web.Again(f"{host_of(url)} answers, but {error.what}") from None

        return web.persist(href, one_try)


def _place(dataset: DatasetReader, options: ReadOptions, label: str) -> SourcePlace:
    """Where an image is: `--input-crs` goes before what the image says, and that before a guess."""
    given = options.crs or dataset.crs or options.fallback_crs
    way_out = "name the CRS of its coordinates with --input-crs, for example --input-crs EPSG:32610"
    if not given:
        raise ImageryError("no coordinate reference system", where=label, remedy=way_out)
    try:
        ground_crs(given, label)
    except InputError as error:
        raise ImageryError(error.what, where=label, expected=error.expected, remedy=way_out) from error
    return SourcePlace.of(dataset, given)


def _with_colour(white: float, values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same without pixels of a number that is no brightness."""
    return values, valid if values.dtype == np.uint8 else valid & ~no_colour(values, white)


def _expand(
    palette: NDArray[np.uint8], values: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Palette indexes (1, h, w) -> RGB (3, h, w); transparent is invalid."""
    rgba = palette[values[0]]
    return np.moveaxis(rgba[..., :3], -1, 0), valid & (rgba[..., 3] > 0)
