"""Files and URLs of rasters as one source."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

import shapely

from canopy.errors import AreaError, ImageryError, InputError
from canopy.geo.aoi import AOI
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid
from canopy.geo.opening import SourcePlace
from canopy.sources.checks import check_options
from canopy.sources.dates import parse_range
from canopy.sources.imagery import ReadOptions
from canopy.sources.mosaic import Mosaic
from canopy.sources.scene import Scene


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
