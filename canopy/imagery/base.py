"""What every source of pixels is: RGB, validity and acquisition date on a grid, also as an xarray array."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import shapely
from numpy.typing import NDArray

from canopy.errors import AreaError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.warp import resample

if TYPE_CHECKING:
    import xarray
    from odc.geo.crs import CRS

    from canopy.terms import Terms

COLOURS = ("red", "green", "blue")


@dataclass(frozen=True)
class Imagery:
    """Pixels on a grid.

    Attributes:
        rgb: float32 (3, height, width), red-green-blue in 0..1; 0 where not valid.
        valid: bool (height, width); True where there is an image.
        date: int32 (height, width), days since 1970-01-01 of the acquisition; 0 = unknown or not valid.
        grid: where the pixels are.
    """

    rgb: NDArray[np.float32]
    valid: NDArray[np.bool_]
    date: NDArray[np.int32]
    grid: Grid


@dataclass(frozen=True)
class ReadOptions:
    """What the user said about how to read the images; None means: as the source declares.

    Attributes:
        bands: 1-based band numbers of red, green and blue.
        nodata: a pixel whose red, green and blue all have this value is missing (any, if it is below 0).
        crs: CRS of the images, in place of what they say.
        on_damaged: of several images, what becomes of one that cannot be read: `fail` or `skip`.
        fallback_crs: for images without a CRS: guessed from what the user said about the map.
        scale: pixel value that means white.
        datetime: STAC-style instant or interval that limits acquisitions.
        gsd_m: ground sample distance that the caller will read at; web tiles choose their zoom by it.
        overviews: for pictures: far coarser grids are read from the files' own overviews.
    """

    bands: str | Sequence[int] | None = None
    nodata: float | None = None
    crs: str | None = None
    scale: float | None = None
    datetime: str | None = None
    gsd_m: float | None = None
    fallback_crs: str | None = None
    on_damaged: str = "fail"
    overviews: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """What was said, JSON-ready: `ReadOptions(**options.to_json())` is the same."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class ImagerySource(ABC):
    """Images that can be read on any grid. Thread-safe: every thread has its own file handles.

    A context manager: `close` lets go of all files at once, and so does dropping the source.

    Attributes:
        name: what to call it in messages and tags; holds no secrets.
        native_crs: CRS of the (topmost) image.
        native_gsd_m: ground metres per pixel of the finest image.
        native_grid: the grid of an image, or of tiles of one lattice, north up, maybe in degrees; or None.
        has_own_extent: True where `area()` is that of the images, whatever was asked for; not for searches
            and tiles.
        notes: warnings to show to the user.
        terms: licence and attribution, where they are known.
    """

    name: str
    terms: Terms | None = None
    native_crs: CRS
    native_gsd_m: float
    native_grid: Grid | None = None
    has_own_extent: bool = True
    notes: list[str]

    @property
    def dates(self) -> tuple[str, ...]:
        """Known acquisition days, ISO, sorted."""
        return ()

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """Ids of the images, topmost first."""
        return (self.name,)

    @abstractmethod
    def area(self) -> AOI | None:
        """Outline of all images, or None where the source does not know."""

    def covers(self, aoi: AOI) -> bool:
        """True when the area lies wholly inside the outline, to a millionth of a degree, or none is known."""
        outline = self.area()
        return outline is None or bool(outline.lonlat.buffer(1e-6).covers(aoi.lonlat))

    @abstractmethod
    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`; outside the images they are not valid."""

    @abstractmethod
    def _pin(self) -> dict[str, Any]:
        """What its kind needs to be opened again, JSON-ready; `kind` says which."""

    def pinned(self) -> dict[str, Any]:
        """What this source is, JSON-ready: `canopy.imagery.open.open_pinned` opens it again without a search.

        URLs in it are unsigned, unless the user's own address carried a signature. What an array became is a
        temporary file of this process.
        """
        return self._pin() | {"terms": self.terms.model_dump() if self.terms else None}

    def close(self) -> None:  # noqa: B027  (a source without files has nothing to do)
        """Let go of all open files; a later `read` opens them again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def to_xarray(
        self,
        *,
        area: AOI | None = None,
        crs: Any | None = None,
        gsd_m: float | None = None,
        chunk_px: int = 2048,
    ) -> xarray.DataArray:
        """The images as a lazy, dask-chunked array; a chunk is read (`read`) when it is computed.

        Args:
            area: what to show; default: the whole area of the source.
            crs: of the array; default: the images' own.
            gsd_m: ground metres per pixel; default: the images' own.
            chunk_px: side of a chunk.

        Returns:
            float32 (band, y, x), bands "red", "green", "blue" in 0..1, NaN where there is no image, with
            CRS, transform and nodata for `.rio` and a coordinate `valid` (y, x).

        Raises:
            InputError: a source without an area of its own, such as web tiles, and none given.
        """
        import dask.array
        import rioxarray  # noqa: F401  (gives arrays their `.rio`)
        import xarray

        outline, whole = area or self.area(), self.native_grid
        wanted = self.native_crs if crs is None else to_crs(crs)
        if outline is None:
            raise InputError("its area is not known", where=self.name, remedy="give to_xarray an area")
        if whole is None or wanted != whole.crs or gsd_m is not None:
            whole = outline.grid(wanted, gsd_m or self.native_gsd_m)
        elif area is not None:
            whole = whole.window_over(area.to_crs(wanted).geometry.bounds)

        def chunk(block_info: Any) -> NDArray[np.float32]:
            _, (top, bottom), (left, right) = block_info[None]["array-location"]
            image = self.read(whole.window(top, left, bottom - top, right - left))
            return np.where(image.valid, image.rgb, np.float32(np.nan))

        (height, width), t = whole.shape, whole.transform
        chunks = dask.array.core.normalize_chunks((3, chunk_px, chunk_px), (3, height, width))
        meta = np.empty((0, 0, 0), np.float32)
        name = f"imagery-{uuid.uuid4().hex}"  # two sources are never one array, whatever dask makes of them
        lazy = dask.array.map_blocks(chunk, chunks=chunks, name=name, dtype=np.float32, meta=meta)
        coords = {
            "band": list(COLOURS),
            "y": t.f + t.e * (np.arange(height) + 0.5),
            "x": t.c + t.a * (np.arange(width) + 0.5),
        }
        attrs = {"long_name": "RGB, white = 1", "imagery": self.name, WHITE: 1.0}
        array = xarray.DataArray(lazy, coords, ("band", "y", "x"), "rgb", attrs)
        array = array.rio.write_crs(whole.crs.to_wkt()).rio.write_transform(t).rio.write_nodata(np.nan)
        return array.assign_coords(valid=(("y", "x"), ~dask.array.isnan(lazy[0])))


WHITE = "canopy_white"  # attribute of arrays: the value that means white, in place of `scale`

Render = Callable[[Grid], tuple[np.ndarray, NDArray[np.bool_]]]
"""`render(window)` -> pixels (3, height, width) and validity (height, width) of a window of a lattice."""


def read_lattice(render: Render, lattice: Grid, grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels of a lattice on any grid: float32 (3, height, width) and validity (height, width).

    Args:
        render: gives the pixels of any window of the lattice; asked only for windows wholly inside it.
        lattice: all there is; nothing outside is valid.
        grid: where the pixels are wanted; 0 where not valid.
    """

    def read(row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        return render(lattice.window(row, col, height, width))

    return resample(SourcePlace.of_grid(lattice), grid, read, 3)


def as_colour(values: NDArray[np.float32], valid: NDArray[np.bool_], white: float) -> NDArray[np.float32]:
    """Stored values (3, h, w) -> 0..1, 0 where not valid; in place."""
    # These pixels are nobody else's, and fresh memory costs more than the arithmetic.
    np.divide(values, np.float32(white), out=values)
    np.clip(values, 0.0, 1.0, out=values)
    if not valid.all():
        values[:, ~valid] = 0.0
    return values


def check_coverage(source: ImagerySource, aoi: AOI) -> None:
    """Refuse an area where the source has no image at all.

    Raises:
        AreaError: nothing there; says so when swapping latitude and longitude would find imagery.
    """
    outline = source.area()
    if outline is None or outline.lonlat.intersects(aoi.lonlat):
        return
    swapped = swapped_area(aoi)
    remedy = f"the imagery covers {outline.describe()}"
    if swapped is not None and outline.lonlat.intersects(swapped.lonlat):
        remedy = SWAP_HINT
    raise AreaError(f"no imagery there ({aoi.describe()})", where=source.name, remedy=remedy)


SWAP_HINT = "swapping latitude and longitude would find imagery: --bbox takes LAT,LON, --bounds takes W,S,E,N"


def swapped_area(aoi: AOI) -> AOI | None:
    """The area that the same numbers mean in the other axis order, or None where that is nowhere."""
    west, south, east, north = aoi.lonlat.bounds
    if max(abs(west), abs(east)) > 90 or max(abs(south), abs(north)) > 180:
        return None
    swapped = shapely.transform(aoi.lonlat, lambda xy: xy[:, ::-1])
    return AOI(swapped, to_crs("EPSG:4326"), aoi.is_box)
