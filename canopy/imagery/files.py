"""Several images as one source, by one rule that does not depend on the window; files and URLs as such.

Scenes have a fixed order, top first: files in the order given; a directory's files and a catalog's items
newest first (ties by name). A pixel comes from the topmost scene that is valid there; scenes below fill what
is left. Nothing is blended, so every pixel has one scene and one date.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray
from odc.geo import CRS

from canopy.errors import AreaError, FetchError, ImageryError, InputError
from canopy.files import is_url, public_name
from canopy.geo.area import AOI
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid
from canopy.imagery.bands import check_options
from canopy.imagery.base import Imagery, ImagerySource, ReadOptions
from canopy.imagery.dates import days_since_epoch, is_within
from canopy.imagery.scene import Handles, Scene, SceneRecord

if TYPE_CHECKING:
    from canopy.web import Signer

# In one mosaic, an image so many times coarser than the finest is told of.
_COARSER = 3.0
_MOST_NOTES = 6
_MOST_NAMED = 3
# Catalogs round outlines: degrees (11 m) by which an image may reach beyond its own.
_ROUNDED_DEG = 1e-4


class Mosaic(ImagerySource):
    """Scenes, topmost first.

    Attributes:
        scenes: the images. Those that lie wholly under others are named only once they gave a pixel.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        *,
        name: str,
        notes: Iterable[str],
        handles: Handles,
        options: ReadOptions,
        signing: str | None = None,
        has_own_extent: bool = True,
    ) -> None:
        """Put scenes together; nothing is opened.

        Args:
            scenes: topmost first.
            name: for messages and tags.
            notes: warnings to show to the user.
            handles: the open files of the scenes.
            options: how the scenes are read.
            signing: who signs their URLs.
            has_own_extent: False where they are what was found for one area.
        """
        self.scenes = tuple(scenes)
        self.name = name
        self.notes = list(dict.fromkeys(notes))
        self.has_own_extent = has_own_extent
        self._handles, self._options, self._signing = handles, options, signing
        self._unused = {number for number, scene in enumerate(scenes) if scene.record.hidden}

    @cached_property
    def native_crs(self) -> CRS:  # type: ignore[override]
        """CRS of the topmost scene, which is opened."""
        return self.scenes[0].facts.place.crs

    @cached_property
    def native_gsd_m(self) -> float:  # type: ignore[override]
        """Ground metres per pixel of the finest scene; of the topmost one where no catalog says."""
        stated = [scene.record.gsd_m for scene in self.scenes if scene.record.gsd_m]
        return min(stated) if stated else self.scenes[0].facts.place.gsd_m

    @cached_property
    def native_grid(self) -> Grid | None:  # type: ignore[override]
        """The grid of one image, or that of tiles of one lattice, north up; None where there is none."""
        if not self.has_own_extent or not all(scene.is_open for scene in self.scenes):
            return None
        try:
            grids = [scene.facts.place.north_up().grid() for scene in self.scenes]
            offsets = [grids[0].offset_of(grid) for grid in grids]
        except InputError:
            return None
        top, left = (min(corner) for corner in zip(*offsets, strict=True))
        bottom = max(row + grid.height for (row, _), grid in zip(offsets, grids, strict=True))
        right = max(col + grid.width for (_, col), grid in zip(offsets, grids, strict=True))
        return grids[0].window(top, left, bottom - top, right - left)

    @property
    def dates(self) -> tuple[str, ...]:
        """Known acquisition days, ISO, sorted, without repeats."""
        return tuple(sorted({record.day.isoformat() for record in self._named() if record.day}))

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """What the scenes are called, topmost first."""
        return tuple(record.scene_id for record in self._named())

    def _named(self) -> list[SceneRecord]:
        return [scene.record for number, scene in enumerate(self.scenes) if number not in self._unused]

    def area(self) -> AOI:
        """Union of the scenes' outlines; where all were opened and share a CRS, exactly in that."""
        return self._area

    @cached_property
    def _area(self) -> AOI:
        facts = [scene.facts for scene in self.scenes if scene.is_open]
        crss = {fact.place.crs for fact in facts}
        if len(facts) == len(self.scenes) and len(crss) == 1 and not facts[0].place.crs.geographic:
            union = shapely.union_all([fact.frame() for fact in facts])
            if isinstance(union, (shapely.Polygon, shapely.MultiPolygon)):
                return AOI(union, crss.pop(), is_box=union.equals(union.envelope))
        union = shapely.union_all([scene.record.outline for scene in self.scenes])
        area = to_lonlat(union, "EPSG:4326")
        return AOI(area, CRS("EPSG:4326"), is_box=area.equals(area.envelope))

    def close(self) -> None:
        """Close the files of all threads."""
        self._handles.close()

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`; each from the topmost scene that is valid there."""
        out: Imagery | None = None
        for number in self.near(grid):
            scene = self.scenes[number]
            if out is None:  # the usual case of one scene copies nothing
                rgb, fresh = scene.read(grid)
                day = np.int32(days_since_epoch(scene.record.day))
                out = Imagery(rgb, fresh, np.where(fresh, day, np.int32(0)), grid)
            else:
                # Lower scenes are asked only for the rectangle that is still missing.
                rows, cols = (np.flatnonzero(~out.valid.all(axis=axis)) for axis in (1, 0))
                if not rows.size:
                    break
                rest = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
                window = grid.window(int(rows[0]), int(cols[0]), *out.valid[rest].shape)
                rgb, valid = scene.read(window)
                fresh = valid & ~out.valid[rest]
                np.copyto(out.rgb[:, *rest], rgb, where=fresh)
                out.date[rest][fresh] = days_since_epoch(scene.record.day)
                out.valid[rest] |= fresh
            if number in self._unused and fresh.any():
                self._unused.discard(number)
        if out is not None:
            return out
        empty = np.zeros((3, *grid.shape), np.float32)
        return Imagery(empty, np.zeros(grid.shape, bool), np.zeros(grid.shape, np.int32), grid)

    def near(self, grid: Grid) -> list[int]:
        """Numbers of the scenes that may touch a grid."""
        try:
            outline = grid.outline()
        except AreaError:
            return [*range(len(self.scenes))]  # the reader decides, pixel by pixel
        outlines = [scene.record.outline for scene in self.scenes]
        near: NDArray[np.bool_] = shapely.dwithin(outlines, outline, _ROUNDED_DEG)
        return np.flatnonzero(near).tolist()

    def _pin(self) -> dict[str, Any]:
        return {
            "kind": "scenes",
            "name": self.name,
            "notes": list(self.notes),
            "options": self._options.to_json(),
            "signing": self._signing,
            "has_own_extent": self.has_own_extent,
            "scenes": [scene.record.model_dump(mode="json") for scene in self.scenes],
        }

    @classmethod
    def from_pin(cls, pin: Mapping[str, Any], area: AOI | None, sign: Signer | None) -> Mosaic:
        """Open what `_pin` described; nothing is searched, and no image is opened before it is read.

        Args:
            pin: of this kind.
            area: leave out the images that do not touch it.
            sign: signs their URLs.

        Raises:
            AreaError: no image touches the area.
        """
        records = [SceneRecord(**row) for row in pin["scenes"]]
        if area is not None:
            records = [r for r in records if shapely.dwithin(r.outline, area.lonlat, _ROUNDED_DEG)]
        if not records:
            raise AreaError("no imagery there", where=pin["name"])
        known = {key: pin[key] for key in ("name", "notes", "signing", "has_own_extent")}
        options, handles = ReadOptions(**pin["options"]), Handles()
        scenes = [Scene(record, options, handles, sign) for record in records]
        return cls(scenes, handles=handles, options=options, **known)


# ---- files -----------------------------------------------------------------------------------
def open_files(
    hrefs: Sequence[str],
    options: ReadOptions,
    *,
    name: str,
    label: str | None = None,
    newest_first: bool = False,
) -> Mosaic:
    """Open rasters, in any mix of CRSs, as a mosaic.

    Args:
        hrefs: paths and http(s) URLs; earlier ones lie on top.
        options: how to read them; `datetime` keeps only those with a date inside the interval.
        name: what to call the source.
        label: what messages and tags call the one image; default: its path, or the URL without its query.
        newest_first: sort by date (unknown dates last) and then by name instead of keeping the order.

    Raises:
        ImageryError: one of them, or where they may be skipped all, cannot be read as RGB; it names the file.
    """
    check_options(options)
    handles = Handles()
    records = [SceneRecord(scene_id=label or public_name(href), assets=(href,)) for href in hrefs]
    scenes = [Scene(record, options, handles) for record in records]
    scenes, skipped = _readable(scenes, options)
    scenes = _within(scenes, options, name)
    if newest_first:
        scenes.sort(key=lambda s: (-(s.record.day or date.min).toordinal(), s.record.scene_id))
    return Mosaic(scenes, name=name, notes=[*skipped, *_notes(scenes)], handles=handles, options=options)


def _readable(scenes: list[Scene], options: ReadOptions) -> tuple[list[Scene], list[str]]:
    """Scenes that can be read, and a note on the others, which are an error unless they may be skipped."""
    if len(scenes) == 1:
        _ = scenes[0].facts
        return scenes, []
    kept, damaged = [], []
    for scene in scenes:
        try:
            scene.check()
            kept.append(scene)
        except FetchError:  # the host may be back in a minute
            raise
        except ImageryError as error:
            if options.on_damaged != "skip":
                skip = "leave out what cannot be read with --on-damaged skip"
                remedy = f"{error.remedy}, or {skip}" if error.remedy else skip
                raise ImageryError(
                    error.what, where=error.where, expected=error.expected, remedy=remedy
                ) from error
            damaged.append(error)
    if not kept:
        raise damaged[0]
    if not damaged:
        return kept, []
    named = [f"{error.where} ({error.what})" for error in damaged[:_MOST_NAMED]]
    named += [f"and {len(damaged) - _MOST_NAMED} more"] if len(damaged) > _MOST_NAMED else []
    return kept, [f"{len(damaged)} of {len(scenes)} images left out: {', '.join(named)}"]


def _within(scenes: list[Scene], options: ReadOptions, name: str) -> list[Scene]:
    """Scenes whose day lies in the interval asked for."""
    kept = [scene for scene in scenes if is_within(scene.record.day, options.datetime)]
    if not kept:
        known = sorted({scene.record.day.isoformat() for scene in scenes if scene.record.day})
        raise ImageryError(
            f"no image of {options.datetime}",
            where=name,
            remedy="the images are of " + ", ".join(known)
            if known
            else "the images do not say when they were taken: put the day into their names "
            "(forest_20210715.tif) or into TIFFTAG_DATETIME",
        )
    return kept


def _notes(scenes: Sequence[Scene]) -> list[str]:
    gsds = [scene.facts.place.gsd_m for scene in scenes]
    notes = [
        f"{scene.record.scene_id}: pixels of {gsd_m:.2g} m among images of {min(gsds):.2g} m: "
        "heights there will be less certain, or mean nothing"
        for scene, gsd_m in zip(scenes, gsds, strict=True)
        if gsd_m > _COARSER * min(gsds)
    ]
    for number, scene in enumerate(scenes):
        notes += scene.facts.notes
        if number == 0 or not is_url(scene.record.assets[0]):  # of many remote ones the first stands for all
            notes += scene.pixel_notes()
    notes = list(dict.fromkeys(notes))
    # A directory of a thousand RGBA files needs no thousand warnings.
    more = len(notes) - _MOST_NOTES
    return notes if more <= 0 else [*notes[:_MOST_NOTES], f"... and {more} more such notes"]
