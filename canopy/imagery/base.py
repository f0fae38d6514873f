"""What every source of pixels is: RGB, validity and acquisition date on a grid, also as an xarray array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from canopy.errors import AreaError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid

if TYPE_CHECKING:
    import xarray
    from odc.geo.crs import CRS

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

    @classmethod
    def empty(cls, grid: Grid) -> Imagery:
        """No image anywhere on `grid`."""
        shape = grid.shape
        return cls(np.zeros((3, *shape), np.float32), np.zeros(shape, bool), np.zeros(shape, np.int32), grid)


@dataclass(frozen=True)
class ReadOptions:
    """What the user said about how to read the images; None means: as the source declares.

    Attributes:
        bands: 1-based band numbers of red, green and blue.
        nodata: a pixel whose red, green and blue all have this value is missing (any, if it is below 0).
        crs: CRS of the images, in place of what they say.
        fallback_crs: for images without a CRS: guessed from what the user said about the map.
        scale: pixel value that means white.
        datetime: STAC-style instant or interval that limits acquisitions.
        gsd_m: ground sample distance that the caller will read at; web tiles choose their zoom by it.
    """

    bands: str | Sequence[int] | None = None
    nodata: float | None = None
    crs: str | None = None
    scale: float | None = None
    datetime: str | None = None
    gsd_m: float | None = None
    fallback_crs: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What was said, JSON-ready: `ReadOptions(**options.to_json())` is the same."""
        return {name: value for name, value in asdict(self).items() if value is not None}


SWAP_HINT = "swapping latitude and longitude would find imagery: --bbox takes LAT,LON, --bounds takes W,S,E,N"


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
        dates: known acquisition days, ISO, sorted.
        scene_ids: ids of the images, topmost first.
        notes: warnings to show to the user.
    """

    name: str
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
    @abstractmethod
    def scene_ids(self) -> tuple[str, ...]:
        """Ids of the images, topmost first."""

    @abstractmethod
    def area(self) -> AOI | None:
        """Outline of all images, or None where the source does not know."""

    def covers(self, aoi: AOI) -> bool:
        """True when the area lies wholly inside the outline (or the outline is unknown)."""
        outline = self.area()
        return outline is None or contains(outline, aoi)

    @abstractmethod
    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`; outside the images they are not valid."""

    @abstractmethod
    def pinned(self) -> dict[str, Any]:
        """What this source is, JSON-ready: `canopy.imagery.open.open_pinned` opens it again without a search.

        URLs in it are unsigned, unless the user's own address carried a signature.

        Raises:
            InputError: the source exists in this process only.
        """

    def close(self) -> None:  # noqa: B027  (a source without files has nothing to do)
        """Let go of all open files; a later `read` opens them again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def to_xarray(
        self,
        grid: Grid | None = None,
        *,
        area: AOI | None = None,
        crs: Any | None = None,
        gsd_m: float | None = None,
        chunk_px: int = 2048,
    ) -> xarray.DataArray:
        """The images as a lazy, dask-chunked array; a chunk is read (`read`) when it is computed.

        Args:
            grid: the pixels wanted; default: the source's own grid, or one made of the following.
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
        return _as_array(self, grid or _grid_of(self, area, crs, gsd_m), chunk_px)


def _grid_of(source: ImagerySource, area: AOI | None, crs: Any | None, gsd_m: float | None) -> Grid:
    native = source.native_grid
    if native is not None and area is None and crs is None and gsd_m is None:
        return native
    outline = area or source.area()
    if outline is None:
        raise InputError(
            "its area is not known", where=source.name, remedy="give to_xarray a grid or an area"
        )
    wanted = to_crs(crs) if crs is not None else source.native_crs
    if native is not None and wanted == native.crs and gsd_m is None:
        return native.window_over(outline.to_crs(wanted).geometry.bounds)
    return outline.grid(wanted, gsd_m or source.native_gsd_m)


class _Window:
    """What dask cuts chunks from: looks like an array, reads when it is indexed."""

    dtype, ndim = np.dtype(np.float32), 3

    def __init__(self, source: ImagerySource, grid: Grid) -> None:
        self.source, self.grid, self.shape = source, grid, (3, *grid.shape)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        bands, rows, cols = (slice(*part.indices(size)) for part, size in zip(index, self.shape, strict=True))
        window = self.grid.window(rows.start, cols.start, rows.stop - rows.start, cols.stop - cols.start)
        image = self.source.read(window)
        return np.where(image.valid, image.rgb, np.float32(np.nan))[bands]


def _as_array(source: ImagerySource, grid: Grid, chunk_px: int) -> xarray.DataArray:
    import dask.array
    import rioxarray  # noqa: F401  (gives arrays their `.rio`)
    import xarray

    lazy = dask.array.from_array(
        _Window(source, grid), chunks=(3, chunk_px, chunk_px), name=False, asarray=False, fancy=False,
        meta=np.empty((0, 0, 0), np.float32),
    )  # fmt: skip
    (height, width), t = grid.shape, grid.transform
    coords = {
        "band": list(COLOURS),
        "y": t.f + t.e * (np.arange(height) + 0.5),
        "x": t.c + t.a * (np.arange(width) + 0.5),
    }
    attrs = {"long_name": "RGB, white = 1", "imagery": source.name, WHITE: 1.0}
    array = xarray.DataArray(lazy, coords, ("band", "y", "x"), "rgb", attrs)
    array = array.rio.write_crs(grid.crs.to_wkt()).rio.write_transform(t).rio.write_nodata(np.nan)
    return array.assign_coords(valid=(("y", "x"), ~dask.array.isnan(lazy[0])))


WHITE = "canopy_white"  # attribute of arrays: the value that means white, in place of `scale`


def check_coverage(source: ImagerySource, aoi: AOI) -> None:
    """Refuse an area where the source has no image at all.

    Raises:
        AreaError: nothing there; says so when swapping latitude and longitude would find imagery.
    """
    outline = source.area()
    if outline is None or overlaps(outline, aoi):
        return
    swapped = swapped_area(aoi)
    remedy = f"the imagery covers {outline.describe()}"
    if swapped is not None and overlaps(outline, swapped):
        remedy = SWAP_HINT
    raise AreaError(f"no imagery there ({aoi.describe()})", where=source.name, remedy=remedy)


def overlaps(one: AOI, other: AOI) -> bool:
    """True when two areas share some ground."""
    return bool(one.to_crs("EPSG:4326").geometry.intersects(other.to_crs("EPSG:4326").geometry))


def contains(outer: AOI, inner: AOI) -> bool:
    """True when `inner` lies wholly inside `outer`, to within a millionth of a degree (0.1 m)."""
    return bool(outer.to_crs("EPSG:4326").geometry.buffer(1e-6).covers(inner.to_crs("EPSG:4326").geometry))


def swapped_area(aoi: AOI) -> AOI | None:
    """The area that the same numbers mean in the other axis order, or None where that is nowhere."""
    import shapely

    geometry = aoi.to_crs("EPSG:4326").geometry
    west, south, east, north = geometry.bounds
    if max(abs(west), abs(east)) > 90 or max(abs(south), abs(north)) > 180:
        return None
    return AOI(shapely.transform(geometry, lambda xy: xy[:, ::-1]), to_crs("EPSG:4326"), aoi.is_box)
