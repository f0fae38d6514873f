"""What every source of pixels is: RGB, validity and acquisition date on a grid, and how it is to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from canopy.errors import AreaError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid

if TYPE_CHECKING:
    from odc.geo.crs import CRS


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
        crs: CRS of images that carry none.
        fallback_crs: the same, guessed from what the user said about the map: for files only, after `crs`.
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


SWAP_HINT = "swapping latitude and longitude would find imagery: --bbox takes LAT,LON, --bounds takes W,S,E,N"


@runtime_checkable
class ImagerySource(Protocol):
    """Images that can be read on any grid. Thread-safe: every thread has its own file handles."""

    @property
    def name(self) -> str:
        """What to call it in messages and tags; holds no secrets."""
        ...

    @property
    def native_crs(self) -> CRS:
        """CRS of the (topmost) image."""
        ...

    @property
    def native_gsd_m(self) -> float:
        """Ground metres per pixel of the finest image."""
        ...

    @property
    def native_grid(self) -> Grid | None:
        """The grid of an image, or of tiles of one lattice, north up, maybe in degrees; None without one."""
        ...

    @property
    def has_own_extent(self) -> bool:
        """True where `area()` is that of the images, whatever was asked for; not for searches and tiles."""
        ...

    @property
    def dates(self) -> tuple[str, ...]:
        """Known acquisition days, ISO, sorted."""
        ...

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """Ids of the images, topmost first."""
        ...

    @property
    def notes(self) -> list[str]:
        """Warnings to show to the user."""
        ...

    def area(self) -> AOI | None:
        """Outline of all images, or None where the source does not know."""
        ...

    def covers(self, aoi: AOI) -> bool:
        """True when the area lies wholly inside the outline (or the outline is unknown)."""
        ...

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`; outside the images they are not valid."""
        ...


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
    from shapely.ops import transform

    geometry = aoi.to_crs("EPSG:4326").geometry
    west, south, east, north = geometry.bounds
    if max(abs(west), abs(east)) > 90 or max(abs(south), abs(north)) > 180:
        return None
    return AOI(transform(lambda x, y: (y, x), geometry), to_crs("EPSG:4326"), aoi.is_box)
