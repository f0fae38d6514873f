"""Several images as one source, by one rule that does not depend on the window.

Scenes have a fixed order, top first: files in the order given; a directory's files and a catalog's items
newest first (ties by name). A pixel comes from the topmost scene that is valid there; scenes below fill what
is left. Nothing is blended, so every pixel has one scene and one date.

One raster, opened on purpose, read as RGB on any grid.

A scene knows its place, its bands and its white from the file's header. Pixels come through the one warped
reader; remote files are retried here, because only the application can see why a host failed.

Files and URLs of rasters as one source.

Imagery that is made or fetched on one fixed lattice, read on any grid.

Web tiles and the synthetic scene exist on a lattice of their own. On that lattice pixels are taken as
they are; on any other grid the needed parts go through the warper of `canopy.geo`, whose values do not
depend on windows.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import rasterio
import rasterio.errors
import shapely
from affine import Affine
from numpy.typing import NDArray
from odc.geo import CRS
from rasterio.io import DatasetReader
from shapely.geometry import MultiPolygon, Polygon

from canopy.errors import AreaError, FetchError, ImageryError, InputError
from canopy.files import is_url, public_name
from canopy.geo.area import AOI
from canopy.geo.crs import project, to_crs, to_lonlat, x_period
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.geo.warp import resample
from canopy.imagery.bands import (
    BandPlan,
    check_georeference,
    check_nodata,
    check_options,
    check_vrt_sources,
    collar_notes,
    plan_bands,
    plan_single,
    radiometry_notes,
)
from canopy.imagery.base import Imagery, ReadOptions, contains
from canopy.imagery.names import acquisition_date, days_since_epoch, parse_range

Pixels = tuple[NDArray[np.float32], NDArray[np.bool_]]


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

    def outline(self) -> Polygon | MultiPolygon:
        """Where the image is, EPSG:4326."""
        ...

    def read(self, grid: Grid) -> Pixels | None:
        """RGB (3, h, w) in 0..1 and validity (h, w), or None where the grid does not touch the image."""
        ...


class Mosaic:
    """An `ImagerySource` made of layers, topmost first."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        name: str,
        native_crs: CRS,
        native_gsd_m: float,
        native_grid: Grid | None = None,
        notes: Sequence[str] = (),
        outline: AOI | None = None,
        has_own_extent: bool = True,
    ) -> None:
        """Take the layers' common facts from the caller, who opened them.

        Args:
            layers: topmost first.
            native_grid: the grid that the images share, if they do.
            outline: where the imagery is, if known more exactly than the union of the layers' outlines.
            has_own_extent: False where the layers are what was found for one area.
        """
        if not layers:
            raise ImageryError("no images", where=name)
        self.layers = tuple(layers)
        self.name = name
        self.native_crs, self.native_gsd_m, self.native_grid = native_crs, native_gsd_m, native_grid
        self.notes = list(dict.fromkeys(notes))
        self.has_own_extent = has_own_extent
        self._area = outline

    @property
    def dates(self) -> tuple[str, ...]:
        """Known acquisition days, ISO, sorted, without repeats."""
        return tuple(sorted({layer.day.isoformat() for layer in self.layers if layer.day}))

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """What the layers are called, topmost first."""
        return tuple(layer.scene_id for layer in self.layers)

    def area(self) -> AOI:
        """Union of the layers' outlines."""
        if self._area is None:
            union = shapely.union_all([layer.outline() for layer in self.layers])
            self._area = AOI(to_lonlat(union, "EPSG:4326"), CRS("EPSG:4326"))
        return self._area

    def covers(self, aoi: AOI) -> bool:
        """True when the area lies wholly inside the outlines."""
        return contains(self.area(), aoi)

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`; each from the topmost layer that is valid there."""
        out: Imagery | None = None
        for layer in self.layers:
            pixels = layer.read(grid)
            if pixels is None:
                continue
            rgb, valid = pixels
            day = np.int32(days_since_epoch(layer.day))
            if out is None:  # the usual case of one layer copies nothing
                out = Imagery(rgb, valid, np.where(valid, day, np.int32(0)), grid)
            else:
                fresh = valid & ~out.valid
                np.copyto(out.rgb, rgb, where=fresh)
                out.valid[fresh] = True
                out.date[fresh] = day
            if out.valid.all():
                break
        return out or Imagery.empty(grid)


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
        from canopy import download as http

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
        from canopy import download as http

        return http.diagnose(url, can_sign=self._sign is not None)

    @contextlib.contextmanager
    def _remote_env(self, url: str) -> Iterator[None]:
        from canopy import download as http

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


def open_files(
    hrefs: Sequence[str], options: ReadOptions, *, name: str, newest_first: bool = False
) -> Mosaic:
    """Open rasters, in any mix of CRSs, as a mosaic.

    Args:
        hrefs: paths and http(s) URLs; earlier ones lie on top.
        options: how to read them; `datetime` keeps only those with a date inside the interval.
        name: what to call the source.
        newest_first: sort by date (unknown dates last) and then by name instead of keeping the order.

    Raises:
        ImageryError: one of them cannot be read as RGB; the message names it.
    """
    check_options(options)
    scenes = [Scene(href, options) for href in hrefs]
    for scene in scenes:
        _ = scene.facts  # a bad file is an error now, not in the middle of the work
    scenes = _within(scenes, options, name)
    if newest_first:
        scenes.sort(key=lambda scene: (-(scene.day or date.min).toordinal(), scene.scene_id))
    notes = [note for scene in scenes for note in scene.facts.notes]
    first = scenes[0].facts
    return Mosaic(
        scenes,
        name=name,
        native_crs=first.place.crs,
        native_gsd_m=min(scene.facts.gsd_m for scene in scenes),
        native_grid=_common_grid([scene.facts.place for scene in scenes]),
        notes=_shorten(notes),
        outline=_outline(scenes),
    )


def _common_grid(places: Sequence[SourcePlace]) -> Grid | None:
    """The grid of one image, or that of tiles of one lattice, north up; None where there is no such grid."""
    try:
        grids = [place.north_up().grid() for place in places]
        offsets = [grids[0].offset_of(grid) for grid in grids]
    except InputError:
        return None
    top, left = (min(corner) for corner in zip(*offsets, strict=True))
    bottom = max(row + grid.height for (row, _), grid in zip(offsets, grids, strict=True))
    right = max(col + grid.width for (_, col), grid in zip(offsets, grids, strict=True))
    return grids[0].window(top, left, bottom - top, right - left)


def _within(scenes: list[Scene], options: ReadOptions, name: str) -> list[Scene]:
    """Scenes whose day lies in the interval asked for."""
    first, last = parse_range(options.datetime)
    if first is None and last is None:
        return scenes
    kept = [s for s in scenes if s.day and (first or date.min) <= s.day <= (last or date.max)]
    if not kept:
        known = sorted({scene.day.isoformat() for scene in scenes if scene.day})
        raise ImageryError(
            f"no image of {options.datetime}",
            where=name,
            remedy="the images are of " + ", ".join(known)
            if known
            else "the images do not say when they were taken: put the day into their names "
            "(forest_20210715.tif) or into TIFFTAG_DATETIME",
        )
    return kept


def _outline(scenes: Sequence[Scene]) -> AOI:
    """Union of the frames: exact in the common CRS if there is one, else in EPSG:4326."""
    facts = [scene.facts for scene in scenes]
    crs = facts[0].place.crs
    if all(fact.place.crs == crs for fact in facts) and not crs.geographic:
        union = shapely.union_all([fact.frame() for fact in facts])
        if isinstance(union, (shapely.Polygon, shapely.MultiPolygon)):
            return AOI(union, crs, is_box=union.equals(union.envelope))
    try:
        union = shapely.union_all([fact.outline() for fact in facts])
    except AreaError as error:
        raise ImageryError(
            f"lies outside the domain of its CRS ({error.what})", where=scenes[0].scene_id
        ) from None
    area = to_lonlat(union, "EPSG:4326")
    return AOI(area, facts[0].place.crs.__class__("EPSG:4326"), is_box=area.equals(area.envelope))


def _shorten(notes: list[str], most: int = 6) -> list[str]:
    """A directory of a thousand RGBA files needs no thousand warnings."""
    unique = list(dict.fromkeys(notes))
    return (
        unique if len(unique) <= most else [*unique[:most], f"... and {len(unique) - most} more such notes"]
    )


Render = Callable[[Grid], tuple[NDArray[np.uint8], NDArray[np.bool_]]]
"""`render(window)` -> uint8 RGB (3, height, width) and validity (height, width) of a lattice window."""


def read_lattice(render: Render, lattice: Grid, grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels of a lattice on any grid.

    Args:
        render: gives uint8 pixels of any window of the lattice; asked only for windows wholly inside it.
        lattice: all there is; nothing outside is valid.
        grid: where the pixels are wanted.

    Returns:
        RGB float32 (3, height, width) in 0..255, 0 where not valid, and validity (height, width).
    """

    def read(row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        return render(lattice.window(row, col, height, width))

    return resample(SourcePlace.of_grid(lattice), grid, read, 3)
