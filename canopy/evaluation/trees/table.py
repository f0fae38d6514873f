"""`canopy trees`: a table of the trees of a height map, or of the heights of crowns that are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from odc.geo import CRS
from shapely.geometry.base import BaseGeometry

from canopy.config import Settings, validate_settings
from canopy.errors import ConfigError, InputError, refuse_options
from canopy.evaluation.grids import own_grid
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.opening import open_heights
from canopy.evaluation.trees.find import blocks_of, find_trees
from canopy.evaluation.zones import check_meeting, geodesic_area_m2, joined, pixels_in, write_table
from canopy.files import check_output
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.geo.heights import HIGHEST_M
from canopy.geo.vector import read_zones
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas

    from canopy.evaluation.opening import HeightSource

FORMATS = (".gpkg", ".parquet")
COARSEST_M = 2.5
PERCENTILE = 95


class TreeOptions(Settings):
    """What `canopy trees` can be asked. With crowns that are given only `nodata`, `band` and `layer` count.

    Attributes:
        min_height_m: of a tree.
        window: width in metres of the crown of a tree of height h, in which no other top may lie:
            window[0] + window[1] h + window[2] h^2. Popescu and Wynne (2004) for all trees; for pines they
            have 3.75105, -0.17919, 0.01241, for broadleaves 3.09632, 0, 0.00895.
        smooth_m: standard deviation of the Gaussian that levels the heights before tops are looked for.
        nodata: value that means missing in the map, in place of what it says.
        band: number or name of the height's band. layer: of a vector file that has several.
    """

    min_height_m: float = 2.0
    window: tuple[float, ...] = (2.51503, 0.0, 0.00901)
    smooth_m: float = 0.5
    nodata: float | None = None
    band: int | str | None = None
    layer: str | None = None

    def check(self, given: bool) -> None:
        """Raises InputError for values out of range, or without use where crowns are given or not."""
        of_finding = {"--min-height": "min_height_m", "--window": "window", "--smooth": "smooth_m"}
        typed = {option: True for option, name in of_finding.items() if name in self.model_fields_set}
        if given:
            refuse_options(typed, where="--crowns", because="trees that are given are not looked for")
        else:
            refuse_options({"--layer": self.layer}, where="canopy trees", because="only --crowns has layers")
        if not 0 < self.min_height_m < HIGHEST_M:
            expected = f"metres above 0, below {HIGHEST_M:g}"
            raise ConfigError(f"{self.min_height_m:g} m", where="--min-height", expected=expected)
        if not 0 <= self.smooth_m <= 10:
            raise ConfigError(f"{self.smooth_m:g} m", where="--smooth", expected="metres from 0 to 10")
        if not self.window or not np.isfinite(self.window).all():
            raise ConfigError(str(self.window), where="--window", expected="numbers, such as 2.5,0,0.009")


def trees(
    map: HeightSource,
    out: str | Path | None = None,
    *,
    crowns: str | Path | geopandas.GeoDataFrame | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> geopandas.GeoDataFrame:
    """The trees of a height map; or, with `crowns`, the heights of crowns from anybody's detector.

    Trees that are found come in the map's CRS, from north to south: `tree` (a number), `height_m` (the map's
    at the top), with `height_lower_m` and `height_upper_m` where the map has an interval, `crown_m2` (ground
    area), `x`, `y` (of the top), `lon`, `lat`, `geometry` (the crown) and `top` (a point).

    Crowns that are given keep their columns and CRS and get `n` (valid pixels they touch), `valid_share`,
    `max_m`, `mean_m` and `p95_m` of their ground, and the last three of the ends of the map's interval
    (`p95_lower_m`, ...): what they would be if every pixel lay there.

    What a reader must know is in `attrs["notes"]`, what is walked over in `attrs["work"]`.

    Args:
        map: a height map: a path, a folder of tiles, or an xarray DataArray with a CRS.
        out: a .gpkg (layers `crowns` and `tops`) or a .parquet (GeoParquet); None writes nothing.
        crowns: polygons in any vector file and CRS, or a GeoDataFrame.
        dry_run: check all, and give no rows.
        options: see `TreeOptions`.

    Raises InputError: an unreadable map or file, a bad option or name of `out`, pixels that hold several
    trees. Nothing is written.
    """
    chosen = validate_settings(TreeOptions, options, "trees")
    chosen.check(crowns is not None)
    if out is not None:
        check_output(out, [map, crowns], overwrite=overwrite, suffixes=FORMATS)
    given = None if crowns is None else read_zones(crowns, chosen.layer)
    progress = progress or NoProgress()
    with open_heights(map, nodata=chosen.nodata, band=chosen.band) as heights:
        grid = own_grid(heights)
        if grid.gsd_m > COARSEST_M:
            raise InputError(
                f"pixels of {grid.gsd_m:.3g} m hold several trees", where=heights.name,
                expected=f"pixels of at most {COARSEST_M:g} m", remedy="canopy stats has heights of stands",
            )  # fmt: skip
        work = f"{grid.width:,} x {grid.height:,} px of {grid.gsd_m:.3g} m in {len(blocks_of(grid)):,} blocks"
        if given is not None:
            check_meeting(given[2], given[1], heights.outline, crowns)
            work = f"{len(given[2]):,} crowns"
        if dry_run:
            table = given[0].iloc[:0].copy() if given else _table([], grid, heights.has_interval)
        elif given is not None:
            table = _heights_on(heights, grid, *given, progress)
        else:
            table = _find(heights, grid, chosen, progress)
        notes = list(heights.notes)
    if not dry_run and not given and not len(table):
        notes.append(f"no tree: nothing in the map is {chosen.min_height_m:g} m high or more")
    if out is not None and not dry_run:
        layers = {"crowns": table}
        if given is None:
            layers = {
                "crowns": table.drop(columns="top"),
                "tops": table.drop(columns="geometry").set_geometry("top"),
            }
        write_table(table, Path(out).expanduser(), layers)
    table.attrs |= {"notes": notes, "work": work}
    return table


def _find(heights: HeightMap, grid: Grid, chosen: TreeOptions, progress: Progress) -> geopandas.GeoDataFrame:
    """Trees of all blocks, in an order that no block has a part in."""
    progress.start(len(blocks_of(grid)), "blocks")
    found = []
    for block in find_trees(heights, grid, chosen.min_height_m, chosen.window, chosen.smooth_m):
        found.append(block)
        progress.advance()
    return _table(found, grid, heights.has_interval)


def _table(found: list[Any], grid: Grid, interval: bool) -> geopandas.GeoDataFrame:
    """Blocks' trees as `trees` gives them."""
    import geopandas

    names = ("height_m", "height_lower_m", "height_upper_m")[: 3 if interval else 1]
    row, col = np.concatenate([np.zeros((2, 0)), *(block.row_col for block in found)], axis=1)
    height_m = np.concatenate([np.zeros((len(names), 0)), *(block.height_m for block in found)], axis=1)
    area_m2 = np.concatenate([np.zeros(0), *(block.area_m2 for block in found)])
    crowns = [crown for block in found for crown in block.crowns]
    order = np.lexsort((col, row))
    x, y = grid.xy(row[order] + 0.5, col[order] + 0.5)
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(x, y)
    columns: dict[str, Any] = {"tree": np.arange(1, len(order) + 1)}
    columns |= {name: heights[order] for name, heights in zip(names, height_m, strict=True)}
    columns |= {"crown_m2": area_m2[order], "x": x, "y": y, "lon": lon, "lat": lat}
    crs = grid.crs.to_wkt()
    shapes = geopandas.GeoSeries([crowns[index] for index in order], crs=crs)
    table = geopandas.GeoDataFrame(columns, geometry=shapes, crs=crs)
    table["top"] = geopandas.GeoSeries(geopandas.points_from_xy(x, y), crs=crs)
    return table


def _heights_on(
    heights: HeightMap,
    grid: Grid,
    frame: geopandas.GeoDataFrame,
    crs: CRS,
    shapes: list[BaseGeometry | None],
    progress: Progress,
) -> geopandas.GeoDataFrame:
    """Crowns with the numbers of the ground they cover; None where no pixel is valid."""
    progress.start(len(shapes), "crowns")
    ends = ("", "_lower", "_upper")[: 3 if heights.has_interval else 1]
    rows = []
    for crown in shapes:
        parts = list(pixels_in(lambda tile: heights.read(tile, interval=True), grid, crown, crs))
        values = np.concatenate([np.zeros((len(ends), 0)), *(part.values for part in parts)], axis=1)
        weight = np.concatenate([np.zeros(0), *(part.weight for part in parts)])
        share = weight.sum() / geodesic_area_m2(crown, crs) if weight.size and crown is not None else 0.0
        row: dict[str, Any] = {"n": weight.size, "valid_share": min(1.0, share)}
        for end, height_m in zip(ends, values, strict=True):
            order = np.argsort(height_m)
            ground = np.cumsum(weight[order])
            row |= dict.fromkeys(f"{name}{end}_m" for name in ("max", "mean", f"p{PERCENTILE}"))
            if weight.size:
                at = int(np.searchsorted(ground, PERCENTILE / 100 * ground[-1] * (1 - 1e-12)))
                row[f"max{end}_m"], row[f"p{PERCENTILE}{end}_m"] = height_m.max(), height_m[order][at]
                row[f"mean{end}_m"] = height_m @ weight / ground[-1]
        rows.append(row)
        progress.advance()
    return joined(frame, rows)
