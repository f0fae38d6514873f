"""One raster, opened on purpose, read as RGB on any grid.

A scene knows its place, its bands and its white from the file's header. Pixels come through the one warped
reader; remote files are retried here, because only the application can see why a host failed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import TypeVar

import numpy as np
import rasterio
import rasterio.errors
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from shapely.geometry import MultiPolygon, Polygon

from canopy.errors import AreaError, FetchError, ImageryError
from canopy.geo.crs import project, to_crs, to_lonlat, x_period
from canopy.geo.grid import Grid
from canopy.geo.opening import SourcePlace, open_raster
from canopy.geo.paths import is_url, public_name
from canopy.geo.window import read_window
from canopy.sources.bands import BandPlan, plan_bands, plan_single
from canopy.sources.checks import (
    check_georeference,
    check_nodata,
    check_vrt_sources,
    collar_notes,
    radiometry_notes,
)
from canopy.sources.dates import acquisition_date
from canopy.sources.imagery import ReadOptions
from canopy.sources.mosaic import Pixels

OPEN_FILES_PER_THREAD = 24
# A cut connection deserves another try; a host that answers well and still gives no image has a damaged file.
_HEALTHY_RETRIES = 3
_handles = threading.local()
_keys = itertools.count()
T = TypeVar("T")


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

    def outline(self) -> Polygon | MultiPolygon:
        """Edge of the raster, EPSG:4326."""
        return to_lonlat(self.frame(), self.place.crs)

    def frame(self) -> Polygon:
        """Edge of the raster in its own CRS."""
        place = self.place
        corners = [(0, 0), (place.width, 0), (place.width, place.height), (0, place.height)]
        return Polygon([place.transform * corner for corner in corners])

    @property
    def gsd_m(self) -> float:
        """Ground sample distance at the centre, metres (geometric mean of both directions)."""
        transform, place = self.place.transform, self.place
        side = abs(transform.determinant) ** 0.5
        x, y = transform * (place.width / 2, place.height / 2)
        return Grid.of(place.crs, Affine(side, 0, x - side / 2, 0, -side, y + side / 2), (1, 1)).gsd_m


class Scene:
    """A raster file or URL as one layer of a mosaic. Opened on first need; thread-safe."""

    def __init__(
        self,
        href: str,
        options: ReadOptions,
        *,
        label: str | None = None,
        day: date | None = None,
        outline: Polygon | MultiPolygon | None = None,
        sign: Callable[[str, bool], str] | None = None,
        grey: bool = False,
    ) -> None:
        """Describe a raster without opening it.

        Args:
            href: path or http(s) URL, unsigned.
            options: how to read it.
            label: name for messages and ids; default: the path or the URL without its query.
            day: acquisition day, when a catalog knows it better than the file.
            outline: where it is in EPSG:4326, when a catalog says (saves opening it to find out).
            sign: turns `href` into a URL that may be read now.
            grey: the file is one colour of a set: its first band is read.
        """
        self.href, self._options, self._sign, self._grey = href, options, sign, grey
        self.scene_id = label or public_name(href)
        self._day, self._outline = day, outline
        self._facts: SceneFacts | None = None
        self._lock = threading.Lock()
        self._key = next(_keys)

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
                if isinstance(found, ImageryError):
                    raise found
                self._facts = found
            return self._facts

    def outline(self) -> Polygon | MultiPolygon:
        """Where the image is, EPSG:4326."""
        return self._outline if self._outline is not None else self.facts.outline()

    def read(self, grid: Grid) -> Pixels | None:
        """RGB in 0..1 and validity on `grid`; None where the grid does not touch the image."""
        if not self._touches(grid):
            return None
        facts, nodata = self.facts, self._options.nodata
        plan = facts.plan

        def pixels(dataset: DatasetReader) -> tuple[np.ndarray, np.ndarray]:
            decode = _expander(plan.palette) if plan.palette is not None else None
            return read_window(
                dataset, grid, plan.indexes, nodata=nodata, crs=facts.place.crs, decode=decode, colours=True
            )

        values, valid = self._try(pixels)
        # In place: these pixels are nobody else's, and fresh memory costs more than the arithmetic.
        np.divide(values, np.float32(plan.divisor), out=values)
        np.clip(values, 0.0, 1.0, out=values)
        if not valid.all():
            values[:, ~valid] = 0.0
        return values, valid

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

    def _study(self, dataset: DatasetReader) -> SceneFacts | ImageryError:
        """Facts, or the reason why this image will never do (returned, so that no retry is spent on it)."""
        label, options = self.scene_id, self._options
        try:
            if dataset.driver == "VRT":
                check_vrt_sources(dataset, label)
            check_georeference(dataset, label)
            # `--crs` speaks for images that carry none; it never moves one that knows its place.
            place = SourcePlace.of(dataset, None if dataset.crs else options.crs or options.fallback_crs)
            if self._grey:
                plan = plan_single(dataset, where=label, scale=options.scale)
            else:
                plan = plan_bands(dataset, where=label, bands=options.bands, scale=options.scale)
            check_nodata(dataset, plan, options.nodata, label)
        except ImageryError as error:
            return error
        except rasterio.errors.RasterioError as error:
            raise ImageryError(f"unreadable pixels ({error})", where=label) from error
        notes = list(plan.notes)
        if dataset.crs and options.crs and place.crs != to_crs(options.crs):
            notes.append(f"{label}: carries its own CRS; --input-crs {options.crs} is for images without one")
        day = acquisition_date(dataset.tags(), public_name(self.href))
        if not is_url(self.href):
            for check in (radiometry_notes, partial(collar_notes, nodata=options.nodata)):
                found = check(dataset, plan, label)
                notes += found or []
                if found is None:
                    self._forget_handle()
                    break
        return SceneFacts(place, plan, day, tuple(notes))

    def _try(self, work: Callable[[DatasetReader], T]) -> T:
        """Run `work` on this thread's handle; for remote rasters again after failures that may pass."""
        if not is_url(self.href):
            try:
                return work(self._handle(self.href))
            except ImageryError:
                # What GDAL gives after it has failed is not to be trusted: the handle is never read again.
                self._forget_handle()
                raise
        from canopy.sources import http

        healthy = 0
        for attempt in range(http.policy().attempts):
            url = self._sign(self.href, attempt > 0) if self._sign else self.href
            # Before GDAL sees a new file, ask for its first bytes: only then is the host's answer known.
            said, wait = self._ask(url) if self._facts is None or attempt else ("", None)
            if not said:
                try:
                    with self._remote_env(url), http.host_slot(url):
                        return work(self._handle(url))
                except FetchError:
                    raise
                except ImageryError as error:
                    healthy += attempt > 0
                    said = f"{http.host_of(url)} answers, but {error.what}"
                self._forget_handle()
            hopeless = healthy > _HEALTHY_RETRIES or (attempt > 0 and http.is_unknown_host(said))
            if hopeless or attempt + 1 == http.policy().attempts:
                break
            http.pause(self.href, attempt, said, wait)
        raise http.gave_up(self.href, said, attempt + 1)

    def _ask(self, url: str) -> tuple[str, float | None]:
        from canopy.sources import http

        return http.diagnose(url, can_sign=self._sign is not None)

    @contextlib.contextmanager
    def _remote_env(self, url: str) -> Iterator[None]:
        from canopy.sources import http

        with rasterio.Env(**http.gdal_options(), **http.local_proxy_options(url)):
            yield

    def _handle(self, url: str) -> DatasetReader:
        """This thread's open dataset; the least recently used one is closed when there are many."""
        pool: OrderedDict[tuple[int, str], DatasetReader] | None = getattr(_handles, "pool", None)
        if pool is None:
            pool = _handles.pool = OrderedDict()
        key = (self._key, url)
        if key not in pool:
            # A new signature makes a new URL: the handle with the old one is of no more use.
            self._forget_handle()
            pool[key] = open_raster(url, georeferenced=False)
            while len(pool) > OPEN_FILES_PER_THREAD:
                pool.popitem(last=False)[1].close()
        pool.move_to_end(key)
        return pool[key]

    def _forget_handle(self) -> None:
        pool = getattr(_handles, "pool", None) or {}
        for key in [key for key in pool if key[0] == self._key]:
            with contextlib.suppress(rasterio.errors.RasterioError):
                pool.pop(key).close()


def _expander(
    palette: NDArray[np.uint8],
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Decoder for `read_window`: palette indexes (1, h, w) -> RGB (3, h, w); transparent is invalid."""

    def expand(values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rgba = palette[values[0]]
        return np.moveaxis(rgba[..., :3], -1, 0), valid & (rgba[..., 3] > 0)

    return expand
