"""Several images as one source, by one rule that does not depend on the window.

Scenes have a fixed order, top first: files in the order given; a directory's files and a catalog's items
newest first (ties by name). A pixel comes from the topmost scene that is valid there; scenes below fill what
is left. Nothing is blended, so every pixel has one scene and one date.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Protocol

import numpy as np
import shapely
from numpy.typing import NDArray
from odc.geo import CRS
from shapely.geometry import MultiPolygon, Polygon

from canopy.errors import ImageryError
from canopy.geo.aoi import AOI
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid
from canopy.sources.dates import days_since_epoch
from canopy.sources.imagery import Imagery, contains

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
