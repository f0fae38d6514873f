"""Several images as one source, by one rule that does not depend on the window; files and URLs as such.

Scenes have a fixed order, top first: files in the order given; a directory's files and a catalog's items
newest first (ties by name). A pixel comes from the topmost scene that is valid there; scenes below fill what
is left. Nothing is blended, so every pixel has one scene and one date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from odc.geo import CRS

from canopy.errors import AreaError, ImageryError, InputError
from canopy.files import is_url
from canopy.geo.area import AOI
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.warp import resample
from canopy.imagery.bands import check_options
from canopy.imagery.base import COLOURS, Imagery, ImagerySource, ReadOptions
from canopy.imagery.names import days_since_epoch, parse_range
from canopy.imagery.scene import Handles, Layer, Outline, Scene, SceneFacts, ThreeBands
from canopy.imagery.signing import signer

# In one mosaic, an image so many times coarser than the finest is told of.
_COARSER = 3.0


@dataclass(frozen=True)
class SceneRecord:
    """What is known of an image before it is opened; all that `pinned` keeps of it.

    Attributes:
        scene_id: for messages and tags.
        assets: one href (RGB) or three (red, green, blue), absolute, unsigned.
        day: acquisition day, or None.
        outline: EPSG:4326, or None: only the file knows.
        bands: band numbers of red, green, blue in the one asset, when a catalog says.
        hidden: lies wholly under the outlines of images above it: read only where those have no pixels.
    """

    scene_id: str
    assets: tuple[str, ...]
    day: date | None = None
    outline: Outline | None = None
    bands: tuple[int, int, int] | None = None
    hidden: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "id": self.scene_id,
            "assets": list(self.assets),
            "date": self.day.isoformat() if self.day else None,
            "outline": self.outline.wkt if self.outline is not None else None,
            "bands": list(self.bands) if self.bands else None,
            "hidden": self.hidden,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> SceneRecord:
        """What `to_json` made."""
        return cls(
            row["id"],
            tuple(row["assets"]),
            date.fromisoformat(row["date"]) if row["date"] else None,
            shapely.from_wkt(row["outline"]) if row["outline"] else None,
            tuple(row["bands"]) if row["bands"] else None,
            row["hidden"],
        )

    def layer(self, options: ReadOptions, handles: Handles, signing: str | None) -> Scene | ThreeBands:
        """The image as a layer, not yet opened."""
        more: dict[str, Any] = {"day": self.day, "outline": self.outline, "sign": signer(signing)}
        if len(self.assets) == 1:
            if options.bands is None and self.bands is not None:
                options = ReadOptions(**{**options.to_json(), "bands": self.bands})
            return Scene(self.assets[0], options, handles, label=self.scene_id, **more)
        scenes = [
            Scene(href, options, handles, label=f"{self.scene_id} {colour}", grey=True, **more)
            for href, colour in zip(self.assets, COLOURS, strict=True)
        ]
        return ThreeBands(self.scene_id, scenes)


class Mosaic(ImagerySource):
    """Layers, topmost first."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        name: str,
        native_crs: CRS,
        native_gsd_m: float,
        native_grid: Grid | None = None,
        notes: Iterable[str] = (),
        outline: AOI | None = None,
        has_own_extent: bool = True,
        hidden: Iterable[int] = (),
        handles: Handles | None = None,
        pin: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the layers' common facts from the caller, who opened them.

        Args:
            layers: topmost first.
            native_grid: the grid that the images share, if they do.
            outline: where the imagery is, if known more exactly than the union of the layers' outlines.
            has_own_extent: False where the layers are what was found for one area.
            hidden: numbers of layers that lie wholly under others: named only once they gave a pixel.
            handles: the open files of the layers.
            pin: options, signing and records of the layers, for `pinned`; None: they cannot be pinned.
        """
        if not layers:
            raise ImageryError("no images", where=name)
        self.layers = tuple(layers)
        self.name = name
        self.native_crs, self.native_gsd_m, self.native_grid = native_crs, native_gsd_m, native_grid
        self.notes = list(dict.fromkeys(notes))
        self.has_own_extent = has_own_extent
        self._area, self._handles, self._pin = outline, handles, pin
        self._unused = set(hidden)

    @property
    def dates(self) -> tuple[str, ...]:
        """Known acquisition days, ISO, sorted, without repeats."""
        return tuple(sorted({layer.day.isoformat() for layer in self._named() if layer.day}))

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """What the layers are called, topmost first."""
        return tuple(layer.scene_id for layer in self._named())

    def _named(self) -> list[Layer]:
        return [layer for number, layer in enumerate(self.layers) if number not in self._unused]

    def area(self) -> AOI:
        """Union of the layers' outlines."""
        if self._area is None:
            union = shapely.union_all([layer.outline() for layer in self.layers])
            self._area = AOI(to_lonlat(union, "EPSG:4326"), CRS("EPSG:4326"))
        return self._area

    def close(self) -> None:
        """Close the files of all threads."""
        if self._handles is not None:
            self._handles.close()

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`; each from the topmost layer that is valid there."""
        out: Imagery | None = None
        for number, layer in enumerate(self.layers):
            # Lower layers are asked only for the rectangle that is still missing.
            missing = np.s_[:, :] if out is None else _rectangle(~out.valid)
            if missing is None:
                break
            pixels = layer.read(grid if out is None else _cut(grid, missing))
            if pixels is None:
                continue
            rgb, valid = pixels
            day = np.int32(days_since_epoch(layer.day))
            if out is None:  # the usual case of one layer copies nothing
                out = Imagery(rgb, valid, np.where(valid, day, np.int32(0)), grid)
                fresh = valid
            else:
                fresh = valid & ~out.valid[missing]
                np.copyto(out.rgb[:, *missing], rgb, where=fresh)
                out.date[missing][fresh] = day
                out.valid[missing] |= fresh
            if number in self._unused and fresh.any():
                self._unused.discard(number)
        return out or Imagery.empty(grid)

    def pinned(self) -> dict[str, Any]:
        """Facts and scene records, JSON-ready; see `ImagerySource.pinned`."""
        if self._pin is None:
            raise InputError("an array in memory cannot be opened elsewhere", where=self.name)
        grid, area = self.native_grid, self._area
        return {
            "kind": "scenes",
            "name": self.name,
            "crs": self.native_crs.to_wkt(),
            "gsd_m": self.native_gsd_m,
            "grid": None if grid is None else [*grid.transform[:6], *grid.shape, grid.crs.to_wkt()],
            "area": None if area is None else [area.geometry.wkt, area.crs.to_wkt(), area.is_box],
            "has_own_extent": self.has_own_extent,
            "notes": list(self.notes),
            **self._pin,
        }

    @classmethod
    def from_pin(cls, pin: Mapping[str, Any], area: AOI | None = None) -> Mosaic:
        """Open what `pinned` described; nothing is searched, and no image is opened before it is read.

        Args:
            pin: of this kind.
            area: leave out the images that do not touch it.

        Raises:
            AreaError: no image touches the area.
        """
        records = [SceneRecord.from_json(row) for row in pin["scenes"]]
        if area is not None:
            near = area.lonlat.buffer(1e-4)
            records = [r for r in records if r.outline is None or r.outline.intersects(near)]
        if not records:
            raise AreaError("no imagery there", where=pin["name"])
        options, handles, grid, outline = ReadOptions(**pin["options"]), Handles(), pin["grid"], pin["area"]
        return cls(
            [record.layer(options, handles, pin["signing"]) for record in records],
            name=pin["name"],
            native_crs=CRS(pin["crs"]),
            native_gsd_m=pin["gsd_m"],
            native_grid=grid and Grid.of(grid[8], Affine(*grid[:6]), (grid[6], grid[7])),
            notes=pin["notes"],
            outline=outline and AOI(shapely.from_wkt(outline[0]), CRS(outline[1]), outline[2]),
            has_own_extent=pin["has_own_extent"],
            hidden=[number for number, record in enumerate(records) if record.hidden],
            handles=handles,
            pin={**pin, "scenes": [record.to_json() for record in records]},
        )


def pin_of(records: Iterable[SceneRecord], options: ReadOptions, signing: str | None) -> dict[str, Any]:
    """What a `Mosaic` of these records needs beside its own facts to be opened again."""
    return {
        "options": options.to_json(),
        "signing": signing,
        "scenes": [record.to_json() for record in records],
    }


def _rectangle(missing: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """The smallest rectangle that holds all True, or None where there is none."""
    rows, cols = (np.flatnonzero(missing.any(axis=axis)) for axis in (1, 0))
    return (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)) if rows.size else None


def _cut(grid: Grid, part: tuple[slice, slice]) -> Grid:
    rows, cols = part
    return grid.window(
        int(rows.start), int(cols.start), int(rows.stop - rows.start), int(cols.stop - cols.start)
    )


# ---- files -----------------------------------------------------------------------------------
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
    handles = Handles()
    scenes = [Scene(href, options, handles) for href in hrefs]
    for scene in scenes:
        _ = scene.facts  # a bad file is an error now, not in the middle of the work
    scenes = _within(scenes, options, name)
    if newest_first:
        scenes.sort(key=lambda scene: (-(scene.day or date.min).toordinal(), scene.scene_id))
    first, finest = scenes[0].facts, min(scene.facts.gsd_m for scene in scenes)
    records = [
        SceneRecord(scene.scene_id, (scene.href,), scene.day, _outline_of(scene.facts, scene.scene_id))
        for scene in scenes
    ]
    return Mosaic(
        scenes,
        name=name,
        native_crs=first.place.crs,
        native_gsd_m=finest,
        native_grid=_common_grid([scene.facts.place for scene in scenes]),
        notes=_shorten(_notes(scenes, finest)),
        outline=_outline([scene.facts for scene in scenes], records),
        handles=handles,
        pin=pin_of(records, options, None),
    )


def _notes(scenes: Sequence[Scene], finest: float) -> list[str]:
    notes = [
        f"{scene.scene_id}: pixels of {scene.facts.gsd_m:.2g} m among images of {finest:.2g} m: "
        "heights there will be less certain, or mean nothing"
        for scene in scenes
        if scene.facts.gsd_m > _COARSER * finest
    ]
    for number, scene in enumerate(scenes):
        notes += scene.facts.notes
        if number == 0 or not is_url(scene.href):  # of many remote images the first stands for all
            notes += scene.pixel_notes()
    return notes


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


def _outline_of(facts: SceneFacts, label: str) -> Outline:
    try:
        return facts.outline()
    except AreaError as error:
        raise ImageryError(f"lies outside the domain of its CRS ({error.what})", where=label) from None


def _outline(facts: Sequence[SceneFacts], records: Sequence[SceneRecord]) -> AOI:
    """Union of the frames: exact in the common CRS if there is one, else in EPSG:4326."""
    crs = facts[0].place.crs
    if all(fact.place.crs == crs for fact in facts) and not crs.geographic:
        union = shapely.union_all([fact.frame() for fact in facts])
        if isinstance(union, (shapely.Polygon, shapely.MultiPolygon)):
            return AOI(union, crs, is_box=union.equals(union.envelope))
    area = to_lonlat(shapely.union_all([record.outline for record in records]), "EPSG:4326")
    return AOI(area, CRS("EPSG:4326"), is_box=area.equals(area.envelope))


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
