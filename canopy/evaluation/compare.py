"""`canopy compare`: two height maps of one place, as two products or as two dates."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy import __version__
from canopy.config import Settings, option, validate_settings
from canopy.errors import ConfigError, InputError
from canopy.evaluation.change.agreement import PairSums
from canopy.evaluation.change.rules import CHANGE_CLASSES, change_notes, change_rule, z_of
from canopy.evaluation.change.zones import COLUMNS, zone_changes
from canopy.evaluation.grids import BlockSums, common_grid, pixel_areas_m2, read_on
from canopy.evaluation.maps import HeightMap, years_apart
from canopy.evaluation.opening import open_heights
from canopy.evaluation.report.pages import write_comparison
from canopy.evaluation.scores import without_nan
from canopy.files import check_output, told_as_output
from canopy.geo.area import AOI
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.style import CHANGES, CLASS_COLOURS, class_style, ramp_style
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas
    import pandas
    import xarray

    from canopy.evaluation.opening import HeightSource

TILE_PX = 1024
MODES = ("auto", "products", "dates")
_HELP_AS = "products: how far they agree; dates: what changed from A to B; auto: from their tags."
_HELP_SIGMA = "Standard deviation of a pixel of {}, metres. Default: its interval bands, else 4 m."
# Two maps of one model whose imagery is this far apart are two dates, not two products.
DATES_APART_YEARS = 0.5
COVER_CLASSES = {1: "open in both", 2: "canopy in A only", 3: "canopy in B only", 4: "canopy in both"}


class CompareOptions(Settings):
    """What `canopy compare` can be asked."""

    mode: str = option("auto", _HELP_AS, flags=("--as",), metavar="auto|products|dates")
    gsd: float | None = option(None, "Metres per pixel to compare on, in UTM. Default: the coarser map's.")
    cover_m: float = option(2.0, "Canopy is higher, metres.", flags=("--cover-height",))
    block_m: float = option(100.0, "Side of the blocks in blocks.csv, ground metres.")
    confidence: float = option(0.95, "Of a change, with dates.")
    sigma_a: float | None = option(None, _HELP_SIGMA.format("A"))
    sigma_b: float | None = option(None, _HELP_SIGMA.format("B"))
    nodata_a: float | None = option(None, "Value that means missing in A, in place of what it says.")
    nodata_b: float | None = option(None, "Value that means missing in B.")
    band_a: int | str | None = option(None, "The height's band, of a file with several.", metavar="N|NAME")
    band_b: int | str | None = option(None, "Likewise.", metavar="N|NAME")
    report: bool = option(True, "Draw report.html.", flags=("--report/--no-report",))

    def check(self) -> CompareOptions:
        """The options, or InputError for a value out of range."""
        if self.mode not in MODES:
            raise ConfigError(f"{self.mode!r}", where="--as", expected=", ".join(MODES))
        for name, value, top in (("--cover-height", self.cover_m, 50), ("--block-m", self.block_m, 1e5)):
            if not 0 < value <= top:
                raise ConfigError(f"{value:g} m", where=name, expected=f"above 0, up to {top:g}")
        z_of(self.confidence)
        return self


@dataclass(eq=False)
class Comparison:
    """What was found; `to_dict` is compare.json.

    Attributes:
        mode: "products" or "dates". legend: names of the classes by code.
        facts: both maps, the grid, the area. sums: over all pixels. rule: how a change was told (dates).
        blocks, preview: sums over squares, for the table and the pictures.
        maps: without an output folder, the maps that would lie in it, as DataArrays by name.
        zones: change of every polygon, see `canopy.evaluation.change.zones`.
    """

    mode: str
    legend: Mapping[int, str]
    facts: dict[str, Any]
    sums: PairSums
    blocks: BlockSums
    preview: BlockSums
    rule: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    maps: dict[str, xarray.DataArray] = field(default_factory=dict)
    zones: geopandas.GeoDataFrame | None = None

    @property
    def classes_ha(self) -> dict[str, float]:
        """Ground of each class."""
        return {name: float(self.blocks.sums[name].sum()) / 1e4 for name in self.legend.values()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {"mode": self.mode, **self.facts, "overall": self.sums.overall()}
        if self.mode == "dates":
            plain |= {"change": {"rule": self.rule, "area_ha": self.classes_ha}}
        if self.zones is not None:
            total = self.zones.drop(columns=self.zones.geometry.name).iloc[-1].to_dict()
            plain |= {"zones": without_nan({k: total[k] for k in COLUMNS})}
        return plain | {
            "cover": self.sums.cover_rows(),
            "by_height": self.sums.height_rows(),
            "notes": self.notes,
        }

    def block_table(self) -> pandas.DataFrame:
        """One row per block with valid pixels, in reading order, with the hectares of every class."""
        import pandas

        blocks, grid = self.blocks, self.blocks.block_grid()
        row, col = np.nonzero(blocks.count)
        t = grid.transform
        west, north = t.c + t.a * col, t.f + t.e * row
        lon, lat = transformer(grid.crs, "EPSG:4326").transform(west + t.a / 2, north + t.e / 2)
        mean = {name: blocks.mean(name)[row, col] for name in ("a", "b", "abs")}
        columns = {
            "lon": np.round(lon, 7), "lat": np.round(lat, 7),
            "west": west, "south": north + t.e, "east": west + t.a, "north": north,
            "n": blocks.count[row, col].astype(np.int64), "area_ha": blocks.sums["area"][row, col] / 1e4,
            "mean_a_m": mean["a"], "mean_b_m": mean["b"], "mean_difference_m": mean["b"] - mean["a"],
            "mean_absolute_difference_m": mean["abs"],
        }  # fmt: skip
        for name in self.legend.values():
            columns[f"{name.replace(' ', '_').lower()}_ha"] = blocks.sums[name][row, col] / 1e4
        return pandas.DataFrame(columns)


# ---- canopy compare -------------------------------------------------------------------------------
def compare(
    a: HeightSource,
    b: HeightSource,
    out: str | Path | None = None,
    *,
    zones: str | Path | geopandas.GeoDataFrame | None = None,
    layer: str | None = None,
    area: AOI | None = None,
    overwrite: bool = False,
    inputs: Sequence[Any] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Compare two height maps: paths, folders of tiles, or xarray DataArrays with a CRS.

    Differences are B - A. Products: difference.tif, cover.tif. Dates: change.tif (change and its interval),
    classes.tif. Both: compare.json, summary.csv, cover.csv, by_height.csv, blocks.csv, report.html; with
    `zones` also zones.csv and zones.gpkg.

    Args:
        out: folder to write; None writes nothing, and the maps are in the result's `maps`.
        zones: polygons; the result's `zones` says how each has changed. layer: of a file with several.
        area: limits the comparison. inputs: what else was read, which must not be written over.
        options: see `CompareOptions`.

    Raises InputError for maps that cannot be read or do not meet, impossible options, or existing outputs
    without `overwrite`; nothing is written then.
    """
    chosen = validate_settings(CompareOptions, options, "compare").check()
    if out is not None:
        expected = "a directory for the results"
        check_output(out, [a, b, zones, *inputs], overwrite=overwrite, folder=True, expected=expected)
    with (
        open_heights(a, nodata=chosen.nodata_a, band=chosen.band_a) as one,
        open_heights(b, nodata=chosen.nodata_b, band=chosen.band_b) as two,
    ):
        mode, why = choose_mode(one, two, chosen.mode)
        grid = common_grid(one, two, area, chosen.gsd)
        dates = mode == "dates"
        names = ("change", "classes") if dates else ("difference", "cover")
        bands = ("change", "change_lower", "change_upper") if dates else ("difference",)
        tags = {
            "CANOPY_VERSION": __version__, "CANOPY_COMPARED_A": one.name, "CANOPY_COMPARED_B": two.name,
        }  # fmt: skip
        legend = CHANGE_CLASSES if dates else COVER_CLASSES
        class_tags = {"CANOPY_CLASSES": "; ".join(f"{code} {name}" for code, name in legend.items())}
        coloured = dict(zip(legend, zip(legend.values(), CLASS_COLOURS, strict=False), strict=True))
        with _staging(None if out is None else Path(out).expanduser()) as folder:
            paths = [folder / f"{name}.tif" for name in names]
            with (
                CogWriter(
                    paths[0], grid, [BandSpec(name) for name in bands], tags=tags,
                    style=ramp_style(-15.0, 15.0, CHANGES),
                ) as metres,
                CogWriter(
                    paths[1], grid, [BandSpec("class", "1")], tags=tags | class_tags, encoding="uint8m",
                    overviews="mode", style=class_style(coloured),
                    colours={code: colour for code, (_, colour) in coloured.items()},
                ) as classes,
            ):  # fmt: skip
                found = _walk(one, two, grid, mode, why, chosen, (metres, classes), area, progress)
            if zones is not None:
                found.zones = zone_changes(
                    one, two, grid, zones, layer, cover_m=chosen.cover_m,
                    confidence=chosen.confidence, area=area, progress=progress,
                )  # fmt: skip
                found.notes += found.zones.attrs["notes"]
            if out is None:
                found.maps = {path.stem: _array(path) for path in paths}
            else:
                write_comparison(found, folder, chosen.report)
    return found


def choose_mode(a: HeightMap, b: HeightMap, asked: str) -> tuple[str, str]:
    """ "products" or "dates", and why."""
    if asked != "auto":
        return asked, "asked for"
    same = a.tags.get("CANOPY_MODEL_SHA256") or a.kind, b.tags.get("CANOPY_MODEL_SHA256") or b.kind
    years = years_apart(a.dates, b.dates)
    if same[0] == same[1] and years is not None and abs(years) >= DATES_APART_YEARS:
        if years < 0:
            raise InputError(
                f"A is of {'/'.join(a.dates)}, B of {'/'.join(b.dates)}", where=f"{a.name}, {b.name}",
                expected="the earlier map first", remedy="swap them, or add --as products",
            )  # fmt: skip
        return "dates", "one product, imagery of different dates"
    return "products", "not known to be two dates of one product; --as dates compares them as such"


def _array(path: Path) -> xarray.DataArray:
    """A written map, NaN where missing, with dimensions (y, x), or (band, y, x) if there are several."""
    import rioxarray

    file: Any = rioxarray.open_rasterio(path, masked=True)
    with file:
        made = file.load().rename(path.stem)
    names = made.attrs["long_name"]
    return made[0].drop_vars("band") if isinstance(names, str) else made.assign_coords(band=list(names))


def _walk(
    one: HeightMap, two: HeightMap, grid: Grid, mode: str, why: str, options: CompareOptions,
    writers: tuple[CogWriter, CogWriter], area: AOI | None, progress: Progress | None,
) -> Comparison:  # fmt: skip
    """Read both maps in windows of about 1000 px: memory does not depend on their size."""
    dates, cover_m, progress = mode == "dates", options.cover_m, progress or NoProgress()
    sigmas = options.sigma_a, options.sigma_b
    rule = change_rule(one, two, sigmas, options.confidence, grid.gsd_m)
    halo = rule.halo_px if dates else 0
    legend = CHANGE_CLASSES if dates else COVER_CLASSES
    names = ["a", "b", "abs", "area", "canopy", "blind", *legend.values()]
    blocks = BlockSums(grid, max(1, round(options.block_m / grid.gsd_m)), names)
    preview = BlockSums.picture(grid, ["a", "b", *legend.values()])
    sums = PairSums(sorted({2.0, 5.0, 10.0, cover_m}))
    tiles = tiles_over(grid, TILE_PX)
    progress.start(len(tiles), "comparing")
    # Of the whole grid, so that a pixel's area does not depend on the window it is met in.
    row_areas = pixel_areas_m2(grid)
    for tile in tiles:
        row, col = grid.offset_of(tile)
        wide = tile.pad(halo)
        (a, in_a), (b, in_b) = (read_on(side, wide, interval=dates) for side in (one, two))
        valid = in_a & in_b
        if area is not None and not area.is_box:
            valid &= area.mask(wide)
        judged = rule.judge(a, b, valid, cover_m) if dates else None
        inner = np.s_[..., halo : wide.height - halo, halo : wide.width - halo]
        a, b, valid = a[inner], b[inner], valid[inner]
        ground = np.broadcast_to(row_areas[row : row + tile.height, None], valid.shape)
        canopy = a[0] > cover_m
        blind = np.zeros(valid.shape, bool)
        if judged is not None:
            stored, codes, blind = judged
        else:
            stored, codes = b[:1] - a[:1], 1 + canopy + 2 * (b[0] > cover_m).astype(np.uint8)
        writers[0].write(stored.astype(np.float32), valid, row, col)
        writers[1].write(codes[None].astype(np.float32), valid, row, col)
        sums.add(a[0][valid], b[0][valid], ground[valid])
        members = {name: codes == code for code, name in legend.items()}
        preview.add(row, col, valid, {"a": a[0], "b": b[0], **members})
        parts = {"area": ground > 0, "canopy": canopy, "blind": blind, **members}
        by_area = {name: np.where(part, ground, 0) for name, part in parts.items()}
        blocks.add(row, col, valid, {"a": a[0], "b": b[0], "abs": np.abs(b[0] - a[0]), **by_area})
        progress.advance()
    if sums.n == 0:
        raise InputError(
            "no pixel is valid in both maps", where=f"{one.name}, {two.name}",
            remedy="check their nodata rules (--nodata-a, --nodata-b)",
        )  # fmt: skip
    canopy_m2, blind_m2 = (float(blocks.sums[name].sum()) for name in ("canopy", "blind"))
    told = {
        "confidence": options.confidence,
        "error_a": rule.sources[0],
        "error_b": rule.sources[1],
        "expected_false_share": 1 - options.confidence,
        "undetectable_canopy_share": blind_m2 / canopy_m2 if canopy_m2 else 0.0,
    }
    facts = {
        "a": _side_facts(one),
        "b": _side_facts(two),
        "years_apart": years_apart(one.dates, two.dates),
        "grid": {
            "crs": _crs_text(grid), "width_px": grid.width, "height_px": grid.height, "gsd_m": grid.gsd_m,
            "bounds": list(grid.bounds),
        },
        "area": area.describe() if area else None,
        "cover_height_m": cover_m,
        "block_m": blocks.side_px * grid.gsd_m,
        "canopy_version": __version__,
        "mode_because": why,
    }  # fmt: skip
    notes = [*one.notes, *two.notes, *(change_notes(told) if dates else ())]
    return Comparison(mode, legend, facts, sums, blocks, preview, told if dates else {}, notes)


def _crs_text(placed: Grid | HeightMap) -> str:
    return f"EPSG:{placed.crs.epsg}" if placed.crs.epsg else str(placed.crs.to_wkt())


def _side_facts(heights: HeightMap) -> dict[str, Any]:
    return {
        "name": heights.name,
        "kind": heights.kind,
        "files": len(heights.tiles),
        "crs": _crs_text(heights),
        "gsd_m": heights.gsd_m,
        "step_m": heights.step_m,
        "dates": "/".join(heights.dates) or "unknown",
        "model": heights.tags.get("CANOPY_MODEL"),
        "interval_level": heights.level,
    }


@contextlib.contextmanager
def _staging(out: Path | None) -> Iterator[Path]:
    """A folder beside `out` whose files move into it at the end, or vanish on an error, or without `out`."""
    parent = None if out is None else out.absolute().parent
    if parent is not None and not parent.is_dir():
        raise InputError("no such directory", where=parent, remedy="create it first")
    prefix = f".{'canopy' if out is None else out.name}."
    with (
        told_as_output(out or "the temporary folder"),
        tempfile.TemporaryDirectory(prefix=prefix, suffix=".partial", dir=parent) as folder,
    ):
        yield Path(folder)
        if out is not None:
            out.mkdir(exist_ok=True)
            for path in sorted(Path(folder).iterdir()):
                os.replace(path, out / path.name)
