"""One raster, opened on purpose, read as RGB on any grid.

A scene knows its place, its bands and its white from the file's header. Pixels come through the one warped
reader; remote files are retried here, because only the application can see why a host failed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import rasterio
import rasterio.errors
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from shapely.geometry import MultiPolygon, Polygon

from canopy import download
from canopy.errors import AreaError, FetchError, ImageryError, InputError
from canopy.files import is_url, public_name
from canopy.geo.crs import ground_crs, project, to_crs, to_lonlat, x_period
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.imagery.bands import (
    BandPlan,
    check_georeference,
    check_nodata,
    check_vrt_sources,
    pixel_notes,
    plan_bands,
    plan_single,
)
from canopy.imagery.base import ReadOptions
from canopy.imagery.names import acquisition_date

Pixels = tuple[NDArray[np.float32], NDArray[np.bool_]]
Outline: TypeAlias = Polygon | MultiPolygon
OPEN_FILES_PER_THREAD = 24
# A cut connection deserves another try; a host that answers well and still gives no image has a damaged file.
_HEALTHY_RETRIES = 3
_keys = itertools.count()
T = TypeVar("T")


class Layer(Protocol):
    """One image of a mosaic."""

    @property
    def scene_id(self) -> str:
        """What the image is called."""
        ...

    @property
    def day(self) -> date | None:
        """Acquisition day, or None if unknown."""
        ...

    def outline(self) -> Outline:
        """Where the image is, EPSG:4326."""
        ...

    def read(self, grid: Grid) -> Pixels | None:
        """RGB (3, h, w) in 0..1 and validity (h, w), or None where the grid does not touch the image."""
        ...


class _Pool:
    """Open datasets of one thread, least recently used first."""

    def __init__(self) -> None:
        self.open: OrderedDict[tuple[int, str], DatasetReader] = OrderedDict()


class Handles:
    """Open datasets of one source: each thread has its own, since GDAL's may not be shared.

    They are closed by `close`, with their thread, and when nobody holds the source any more.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._pools: weakref.WeakSet[_Pool] = weakref.WeakSet()
        self._lock = threading.Lock()

    def get(self, key: int, url: str) -> DatasetReader:
        """This thread's dataset of scene `key`; the least recently used is closed when there are many."""
        held = self._held()
        if (key, url) not in held:
            # A new signature makes a new URL: the handle with the old one is of no more use.
            self.drop(key)
            held[key, url] = open_raster(url, georeferenced=False)
            while len(held) > OPEN_FILES_PER_THREAD:
                held.popitem(last=False)[1].close()
        held.move_to_end((key, url))
        return held[key, url]

    def drop(self, key: int) -> None:
        """Close this thread's datasets of scene `key`."""
        held = self._held()
        for found in [place for place in held if place[0] == key]:
            with contextlib.suppress(rasterio.errors.RasterioError):
                held.pop(found).close()

    def close(self) -> None:
        """Close all datasets of all threads; nobody may be reading."""
        with self._lock:
            pools = list(self._pools)
        for pool in pools:
            while pool.open:
                pool.open.popitem()[1].close()

    def _held(self) -> OrderedDict[tuple[int, str], DatasetReader]:
        pool: _Pool | None = getattr(self._here, "pool", None)
        if pool is None:
            pool = self._here.pool = _Pool()
            with self._lock:
                self._pools.add(pool)
        return pool.open


@dataclass(frozen=True)
class SceneFacts:
    """What a raster's header says.

    Attributes:
        place: affine, CRS and shape, of any orientation.
        plan: bands and scaling.
        day: acquisition day, if the file says.
        notes: warnings for the user.
    """

    place: SourcePlace
    plan: BandPlan
    day: date | None
    notes: tuple[str, ...]

    def frame(self) -> Polygon:
        """The image's edge in its own CRS."""
        h, w = self.place.height, self.place.width
        return Polygon([self.place.transform @ corner for corner in ((0, 0), (w, 0), (w, h), (0, h))])

    def outline(self) -> Outline:
        """The image's edge in EPSG:4326, split at the antimeridian."""
        return to_lonlat(self.frame(), self.place.crs)

    @property
    def gsd_m(self) -> float:
        """Ground sample distance at the centre, metres."""
        place = self.place
        transform = place.transform
        side = abs(transform.determinant) ** 0.5
        x, y = transform @ (place.width / 2, place.height / 2)
        return Grid.of(place.crs, Affine(side, 0, x - side / 2, 0, -side, y + side / 2), (1, 1)).gsd_m


class Scene:
    """A raster file or URL as one layer of a mosaic. Opened on first need; thread-safe."""

    def __init__(
        self,
        href: str,
        options: ReadOptions,
        handles: Handles | None = None,
        *,
        label: str | None = None,
        day: date | None = None,
        outline: Outline | None = None,
        sign: Callable[[str, bool], str] | None = None,
        grey: bool = False,
    ) -> None:
        """Describe a raster without opening it.

        Args:
            href: path or http(s) URL, unsigned.
            options: how to read it.
            handles: where open files are kept; default: its own.
            label: name for messages and ids; default: the path or the URL without its query.
            day: acquisition day, when a catalog knows it better than the file.
            outline: where it is in EPSG:4326, when that is known (saves opening it to find out).
            sign: turns `href` into a URL that may be read now.
            grey: the file is one colour of a set: its first band is read.
        """
        self.href, self._options, self._sign, self._grey = href, options, sign, grey
        self.scene_id = label or public_name(href)
        self._day, self._outline = day, outline
        self._facts: SceneFacts | None = None
        self._lock = threading.Lock()
        self._handles, self._key = handles or Handles(), next(_keys)

    @property
    def day(self) -> date | None:
        """Acquisition day, or None if neither catalog nor file (once opened) tells."""
        return self._day or (self._facts.day if self._facts else None)

    @property
    def facts(self) -> SceneFacts:
        """Header facts; opens the raster the first time.

        Raises:
            ImageryError: it cannot be read as RGB in a known place; FetchError when its host fails.
        """
        with self._lock:
            if self._facts is None:
                found = self._try(self._study)
                if isinstance(found, InputError):
                    raise found
                self._facts = found
            return self._facts

    def outline(self) -> Outline:
        """Where the image is, EPSG:4326."""
        return self._outline if self._outline is not None else self.facts.outline()

    def read(self, grid: Grid) -> Pixels | None:
        """RGB in 0..1 and validity on `grid`; None where the grid does not touch the image."""
        if not self._touches(grid):
            return None
        facts, nodata = self.facts, self._options.nodata
        plan = facts.plan

        def pixels(dataset: DatasetReader) -> tuple[np.ndarray, np.ndarray]:
            decode = partial(_expand, plan.palette) if plan.palette is not None else None
            return read_window(
                dataset, grid, plan.indexes, nodata=nodata, crs=facts.place.crs, decode=decode, colours=True
            )

        values, valid = self._try(pixels)
        return as_colour(values, valid, plan.divisor), valid

    def _touches(self, grid: Grid) -> bool:
        facts = self._facts
        try:
            if facts is None or x_period(facts.place.crs):
                # Where x jumps at the antimeridian, or is counted to 360, only outlines that are cut there
                # can be compared. A catalog's is rounded: 1e-4 degrees (11 m) of grace.
                outline = facts.outline() if facts else self.outline()
                return bool(outline.buffer(1e-4).intersects(grid.outline()))
            edge = project(shapely.box(*grid.bounds), grid.crs, facts.place.crs)
        except AreaError:
            return True  # the reader decides, pixel by pixel
        return bool(edge.intersects(facts.frame()))

    def _study(self, dataset: DatasetReader) -> SceneFacts | InputError:
        """Facts, or the reason why this image will never do (returned, so that no retry is spent on it)."""
        label, options = self.scene_id, self._options
        try:
            if dataset.driver == "VRT":
                check_vrt_sources(dataset, label)
            check_georeference(dataset, label)
            place = place_of(dataset, options, label)
            if self._grey:
                plan = plan_single(dataset, where=label, scale=options.scale)
            else:
                plan = plan_bands(dataset, where=label, bands=options.bands, scale=options.scale)
            check_nodata(dataset, plan, options.nodata, label)
        except InputError as error:
            return error
        except rasterio.errors.RasterioError as error:
            raise ImageryError(f"unreadable pixels ({error})", where=label) from error
        notes = list(plan.notes)
        if dataset.crs and options.crs and place.crs != to_crs(dataset.crs.to_wkt()):
            notes.append(f"{label}: --input-crs {options.crs} in place of the CRS that it carries")
        day = acquisition_date(dataset.tags(), public_name(self.href))
        return SceneFacts(place, plan, day, tuple(notes))

    def pixel_notes(self) -> list[str]:
        """Warnings about what a look at a few pixels shows: no colour, all black, an undeclared border.

        Raises:
            FetchError: the host; damaged pixels are no error before they are asked for.
        """
        plan, nodata = self.facts.plan, self._options.nodata

        def look(dataset: DatasetReader) -> list[str] | None:
            return pixel_notes(dataset, plan, self.scene_id, nodata)

        found = self._try(look)
        if found is None:
            self._handles.drop(self._key)
        return found or []

    def _try(self, work: Callable[[DatasetReader], T]) -> T:
        """Run `work` on this thread's handle; for remote rasters again after failures that may pass."""
        if not is_url(self.href):
            try:
                return work(self._handles.get(self._key, self.href))
            except ImageryError:
                # What GDAL gives after it has failed is not to be trusted: the handle is never read again.
                self._handles.drop(self._key)
                raise
        healthy, attempts = 0, download.policy().attempts
        for attempt in range(attempts):
            url = self._sign(self.href, attempt > 0) if self._sign else self.href
            # Before GDAL sees a new file, ask for its first bytes: only then is the host's answer known.
            said, wait = "", None
            if self._facts is None or attempt:
                said, wait = download.diagnose(url, can_sign=self._sign is not None)
            if not said:
                try:
                    with _remote_env(url), download.host_slot(url):
                        return work(self._handles.get(self._key, url))
                except FetchError:
                    raise
                except ImageryError as error:
                    healthy += attempt > 0
                    said = f"{download.host_of(url)} answers, but {error.what}"
                self._handles.drop(self._key)
            hopeless = healthy > _HEALTHY_RETRIES or (attempt > 0 and download.is_unknown_host(said))
            if hopeless or attempt + 1 == attempts:
                break
            download.pause(self.href, attempt, said, wait)
        raise download.gave_up(self.href, said, attempt + 1)


def place_of(dataset: DatasetReader, options: ReadOptions, label: str) -> SourcePlace:
    """Where an image is: `--input-crs` goes before what the image says, and that before a guess.

    Raises:
        InputError: no CRS, or one that places nothing on a map; names the way out.
    """
    given = options.crs or dataset.crs or options.fallback_crs
    way_out = "name the CRS of its coordinates with --input-crs, for example --input-crs EPSG:32610"
    if not given:
        raise ImageryError("no coordinate reference system", where=label, remedy=way_out)
    try:
        ground_crs(given, label)
    except InputError as error:
        raise ImageryError(error.what, where=label, expected=error.expected, remedy=way_out) from error
    return SourcePlace.of(dataset, given)


def as_colour(values: NDArray[np.float32], valid: NDArray[np.bool_], white: float) -> NDArray[np.float32]:
    """Stored values (3, h, w) -> 0..1, 0 where not valid; in place."""
    # These pixels are nobody else's, and fresh memory costs more than the arithmetic.
    np.divide(values, np.float32(white), out=values)
    np.clip(values, 0.0, 1.0, out=values)
    if not valid.all():
        values[:, ~valid] = 0.0
    return values


def _expand(
    palette: NDArray[np.uint8], values: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Palette indexes (1, h, w) -> RGB (3, h, w); transparent is invalid."""
    rgba = palette[values[0]]
    return np.moveaxis(rgba[..., :3], -1, 0), valid & (rgba[..., 3] > 0)


@contextlib.contextmanager
def _remote_env(url: str) -> Iterator[None]:
    with rasterio.Env(**download.gdal_options(), **download.local_proxy_options(url)):
        yield


class ThreeBands:
    """A layer whose red, green and blue are three files."""

    def __init__(self, scene_id: str, scenes: Sequence[Scene]) -> None:
        self.scene_id, self.scenes = scene_id, tuple(scenes)

    @property
    def day(self) -> date | None:
        """Acquisition day."""
        return self.scenes[0].day

    @property
    def facts(self) -> SceneFacts:
        """Those of the red one."""
        return self.scenes[0].facts

    def pixel_notes(self) -> list[str]:
        """None: one band alone says nothing of colour."""
        return []

    def outline(self) -> Outline:
        """Footprint of the item, EPSG:4326."""
        return self.scenes[0].outline()

    def read(self, grid: Grid) -> Pixels | None:
        """RGB and validity; a pixel needs all three files."""
        parts = [scene.read(grid) for scene in self.scenes]
        found = [part for part in parts if part is not None]
        if len(found) < 3:
            return None
        valid = np.logical_and.reduce([part[1] for part in found])
        rgb = np.concatenate([part[0][:1] for part in found])
        rgb[:, ~valid] = 0.0
        return rgb, valid
