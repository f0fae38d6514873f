"""THE reader of height maps: anybody's GeoTIFF, tiles, published map or array, as metres on any grid.

Every command that takes a height raster (evaluate, compare, stats, calibrate) opens it here, so that one rule
holds for all: which band is the height, what its unit is, which heights are impossible, what is missing.

The published maps (EPSG:3857 quadkey tiles of whole metres) need rules of their own, because "0 m" and "not
mapped" look alike in them:

* 255 is never a height, whether or not the tile says so;
* v1 (zoom 9): `NAME.tif.msk`, beside the tile or in `../msk/`, is 255 where the map is NOT valid, the
  opposite of GDAL's masks. Without that file the product cannot tell 0 m from unmapped, and a note says so;
* v2 (zoom 10): whatever the file itself declares (mask band, nodata value); where it declares nothing, the
  same note.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from odc.geo import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from shapely.geometry.base import BaseGeometry

from canopy.chips.targets import sensor_floor
from canopy.errors import CanopyError, ImageryError, InputError
from canopy.files import is_url, public_name
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid, quadkey_bounds
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.imagery.names import acquisition_date

if TYPE_CHECKING:
    import xarray

    HeightSource = str | Path | Sequence[str | Path] | xarray.DataArray

PUBLISHED_ZOOM = {9: "published v1", 10: "published v2"}
NOT_A_HEIGHT = 255
# Handles kept open while windows walk over a mosaic.
OPEN_TILES = 8
DEFAULT_LEVEL = 0.9
# Heights beyond these are no trees: an undeclared nodata value, a bird, a pylon.
LOWEST_M, HIGHEST_M = -50.0, 150.0
# Units as the field writes them, after `_metres_per` has made plurals and American spelling one.
METRES_PER_UNIT = {
    **dict.fromkeys(("", "m", "metre"), 1.0),
    **dict.fromkeys(("dm", "decimetre"), 0.1),
    **dict.fromkeys(("cm", "centimetre"), 0.01),
    **dict.fromkeys(("mm", "millimetre"), 0.001),
    **dict.fromkeys(("ft", "foot", "international foot"), 0.3048),
    **dict.fromkeys(("us survey foot", "us foot", "us ft", "foot us", "ftus", "survey foot"), 1200 / 3937),
}
_SAYS_HEIGHT = re.compile(r"(?<![a-z])chm(?![a-z])|canopy[\s_-]*height", re.IGNORECASE)


@dataclass(frozen=True)
class Tile:
    """One file of a map and what its header says.

    Attributes:
        bands: 1-based: the height, and its lower and upper bound where there are.
        scale, offset: what makes metres of each band's numbers. unit: the band's own, "" where not said.
        step_m: what heights are rounded to; 0: nothing.
        published: "published v1" or "published v2" for a tile of those maps. mask: the v1 map's `.tif.msk`.
        says_missing: whether missing ground can be told; zero_is_missing: whether that is 0 m.
    """

    path: str
    place: SourcePlace
    bands: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    unit: str
    step_m: float
    published: str | None = None
    mask: str | None = None
    says_missing: bool = True
    zero_is_missing: bool = False
    tags: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

    @cached_property
    def outline(self) -> BaseGeometry:
        """Its frame in EPSG:4326."""
        h, w = self.place.height, self.place.width
        x, y = self.place.xy(np.array([0.0, 0, h, h]), np.array([0.0, w, w, 0]))
        return to_lonlat(shapely.Polygon(zip(x, y, strict=True)), self.place.crs)


class HeightMap:
    """An open height map; `read` gives metres on any grid. Use from one thread; close when done.

    Attributes:
        name: what the user called it, without folders; kind: "map", "tiles", "published v1", "published v2".
        tiles: its files. step_m: what heights are rounded to (0: nothing).
        reference: whether maps are judged by it; what that changes is said in `canopy.evaluation.grids`.
        impossible: a height among those read so far that is none; such pixels are invalid. None: all are.
    """

    def __init__(
        self, name: str, tiles: Sequence[Tile], *, nodata: float | None = None, reference: bool = False
    ) -> None:
        self.name, self.tiles, self.nodata, self.reference = name, tuple(tiles), nodata, reference
        first = tiles[0]
        self.kind = first.published or ("map" if len(tiles) == 1 else "tiles")
        self.step_m = max(tile.step_m for tile in tiles)
        self.tags = first.tags
        self.has_interval = all(len(tile.bands) == 3 for tile in tiles)
        self.impossible: float | None = None
        self._tree = shapely.STRtree([tile.outline for tile in tiles])
        self._open: OrderedDict[str, DatasetReader] = OrderedDict()
        self._at_close = contextlib.ExitStack()

    # ---- facts --------------------------------------------------------------------------------
    @property
    def crs(self) -> CRS:
        """CRS of its first file."""
        return self.tiles[0].place.crs

    @cached_property
    def outline(self) -> BaseGeometry:
        """Union of the frames of its files, EPSG:4326."""
        return shapely.union_all([tile.outline for tile in self.tiles])

    @property
    def level(self) -> float | None:
        """Nominal coverage of the interval bands, from the tag CANOPY_INTERVAL; 0.9 where it is not said."""
        if not self.has_interval:
            return None
        with contextlib.suppress(ValueError):
            level = float(self.tags.get("CANOPY_INTERVAL", ""))
            return level if 0 < level < 1 else DEFAULT_LEVEL
        return DEFAULT_LEVEL

    @cached_property
    def lattice(self) -> Grid | None:
        """Grid of its first file, if north-up; every file of a published map lies on its lattice."""
        place = self.tiles[0].place
        return place.grid() if place.is_north_up else None

    @cached_property
    def is_one_lattice(self) -> bool:
        """Whether the pixels of all files lie on one lattice."""
        lattice = self.lattice
        places = [tile.place for tile in self.tiles]
        return lattice is not None and all(p.is_north_up and p.grid().is_aligned(lattice) for p in places)

    @cached_property
    def gsd_m(self) -> float:
        """Ground sample distance in metres at the centre of its first file."""
        return self.lattice.gsd_m if self.lattice is not None else self.tiles[0].place.gsd_m

    @cached_property
    def dates(self) -> tuple[str, ...]:
        """First and last acquisition date or year, ISO; empty where unknown."""
        found = {date for tile in self.tiles for date in _dates_of(tile)}
        if not found:
            days = (acquisition_date(tile.tags, tile.path) for tile in self.tiles[:1000])
            found = {day.isoformat() for day in days if day}
        return tuple(dict.fromkeys((min(found), max(found)))) if found else ()

    @property
    def floor_m(self) -> float:
        """Height below which this reference knows nothing, from its tags; 0 where nothing is said."""
        for name in ("CANOPY_SENSOR", "LIDAR_SENSOR", "SENSOR"):
            with contextlib.suppress(InputError):  # some other sensor: only NEON's height models have floors
                if self.tags.get(name):
                    return sensor_floor(self.tags[name])
        return 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know, one sentence each; complete when everything has been read."""
        found = []
        if any(tile.published and not tile.says_missing for tile in self.tiles):
            found.append(
                "tiles without a mask or nodata value: 0 m and 'not mapped' cannot be told apart in them, "
                "and unmapped ground counts as open"
            )
        if any(tile.published and tile.zero_is_missing for tile in self.tiles) and self.nodata is None:
            found.append("tiles declare 0 as missing, so open ground is left out of every number")
        if self.step_m >= 0.5:
            found.append(
                f"heights are whole multiples of {self.step_m:g} m; whether rounded or cut is not known"
            )
        if self.has_interval and "CANOPY_INTERVAL" not in self.tags:
            found.append(f"its interval bands are taken for a {DEFAULT_LEVEL:.0%} interval")
        for unit in dict.fromkeys(tile.unit for tile in self.tiles if _metres_per(tile.unit) != 1):
            found.append(f"its heights are in {unit} and were converted to metres")
        if self.impossible is not None:
            found.append(
                f"pixels with impossible heights (such as {self.impossible:.6g} m) count as missing: an "
                "undeclared nodata value, or not metres"
            )
        return tuple(f"{self.name}: {note}" for note in found)

    # ---- pixels -------------------------------------------------------------------------------
    def read(
        self, grid: Grid, *, interval: bool = False, resampling: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Heights in metres on `grid`, as `canopy.geo.reading.read_window` resamples them.

        Returns float32 (1, h, w), or (3, h, w) with the ends of the map's interval where it has one and
        `interval` asks for it, 0 where invalid; and valid (h, w). Where files overlap the earlier one counts.
        Raises ImageryError.
        """
        bands = 3 if interval and self.has_interval else 1
        values, valid = np.zeros((bands, *grid.shape), np.float32), np.zeros(grid.shape, bool)
        near = [0] if len(self.tiles) == 1 else sorted(self._tree.query(grid.outline(), "intersects"))
        for index in near:
            got, good = self._read_tile(self.tiles[index], grid, bands, resampling)
            new = good & ~valid
            values[:, new] = got[:, new]
            valid |= new
            if valid.all():
                break
        return values, valid

    def _read_tile(
        self, tile: Tile, grid: Grid, bands: int, resampling: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        scale, offset = (np.array(x[:bands], np.float32)[:, None, None] for x in (tile.scale, tile.offset))

        def metres(raw: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Source pixels before any resampling, so that what is no height never bleeds into one."""
            values = raw.astype(np.float32) * scale + offset
            if tile.published and self.nodata is None:
                valid = valid & (raw[0] != NOT_A_HEIGHT)
            return values, self.without_impossible(values[0], valid, LOWEST_M, HIGHEST_M)

        values, valid = read_window(
            self._dataset(tile.path), grid, tile.bands[:bands], resampling=resampling, nodata=self.nodata,
            decode=metres,
        )  # fmt: skip
        if tile.mask is not None:
            mask: Any = _Placed(self._dataset(tile.mask, georeferenced=False), tile.place)
            masked, known = read_window(mask, grid, [1], nodata=NOT_A_HEIGHT)
            valid &= known & (masked[0] < 1)  # a trace of a masked pixel is the resampling's rounding
        return values, valid

    def without_impossible(
        self, height_m: np.ndarray, valid: np.ndarray, low_m: float, high_m: float
    ) -> np.ndarray:
        """`valid` (h, w) without the pixels whose height is beyond the limits; one of them is kept to say."""
        sane = (height_m >= low_m) & (height_m <= high_m)
        strange = height_m[valid & ~sane]
        if strange.size:
            self.impossible = float(strange[0])
        return valid & sane

    def _dataset(self, path: str, georeferenced: bool = True) -> DatasetReader:
        dataset = self._open.pop(path, None)
        if dataset is None or dataset.closed:
            dataset = open_raster(path, georeferenced=georeferenced)
        self._open[path] = dataset
        while len(self._open) > OPEN_TILES:
            self._open.popitem(last=False)[1].close()
        return dataset

    def close(self) -> None:
        """Close its files; a later `read` opens them anew, but for arrays, which are gone."""
        while self._open:
            self._open.popitem()[1].close()
        self._at_close.close()

    def __enter__(self) -> HeightMap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Placed:
    """A dataset seen at another one's place: the v1 masks carry no georeferencing of their own."""

    def __init__(self, dataset: DatasetReader, place: SourcePlace) -> None:
        if dataset.shape != (place.height, place.width):
            raise ImageryError(
                f"a mask of {dataset.width} x {dataset.height} px", where=public_name(dataset.name),
                expected=f"{place.width} x {place.height} px, as its tile has",
            )  # fmt: skip
        self._dataset, self.transform, self.crs = dataset, place.transform, place.crs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


# ---- opening --------------------------------------------------------------------------------------
def open_heights(
    source: HeightSource,
    *,
    nodata: float | None = None,
    band: int | str | None = None,
    reference: bool = False,
) -> HeightMap:
    """Open a height map.

    Args:
        source: a GeoTIFF, COG or VRT (path or http URL); a folder of tiles (`DIR/chm`, `DIR/tiles` or DIR
            itself); a text file with one path per line; a sequence of files; or an xarray DataArray with
            dimensions (y, x) or (band, y, x) and a CRS (`.rio.crs`).
        nodata: value that means missing, in place of what the files and the rules above say.
        band: number (from 1) or name of the height's band; by default the only one, or the only one that says
            canopy height or CHM.
        reference: maps are judged by it; see `HeightMap`.

    Raises ImageryError for what cannot be read as a height map, naming the file.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, str | Path | Sequence):
            paths = _paths_of(source)
            name = Path(public_name(source if isinstance(source, str | Path) else paths[0]).rstrip("/")).name
            if not isinstance(source, str | Path) and len(paths) > 1:
                name = f"{name} and {len(paths) - 1} more"
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="canopy-array-"))
            paths = [_array_file(source, folder)]
            name = str(source.name or "array")
        tiles = [_open_tile(path, band) for path in paths]
        odd = next((tile for tile in tiles if tile.published != tiles[0].published), None)
        if odd is not None:
            raise ImageryError("tiles of different products in one folder", where=public_name(odd.path))
        made = HeightMap(name, tiles, nodata=nodata, reference=reference)
        made._at_close = stack.pop_all()
    return made


def _array_file(array: xarray.DataArray, folder: str) -> str:
    """A DataArray as a GeoTIFF, chunk by chunk, so that arrays and files are read by one rule."""
    if type(array).__name__ != "DataArray":
        raise ImageryError(
            f"a {type(array).__name__} is no height map",
            expected="a path, a list of paths, or an xarray DataArray with a CRS",
        )
    import rioxarray  # noqa: F401  (registers the .rio accessor)

    where = f"the array {array.name}" if array.name else "the array"
    try:
        crs, _ = array.rio.crs, array.rio.shape
    except Exception as error:  # rioxarray has several kinds for missing dimensions
        raise ImageryError(
            f"dimensions {', '.join(map(str, array.dims))}", where=where, expected="(y, x) or (band, y, x)"
        ) from error
    if crs is None:
        raise ImageryError(
            "no coordinate reference system", where=where,
            remedy='name it with array.rio.write_crs("EPSG:32618"), or whichever it is',
        )  # fmt: skip
    if "band" in array.coords and array["band"].dtype.kind in "UO":  # of canopy.predict: bands by name
        bands = np.atleast_1d(array["band"].values)
        array = array.drop_vars("band").assign_attrs(long_name=tuple(map(str, bands)))
    path = str(Path(folder) / "array.tif")
    array.rio.to_raster(path, windowed=True, tiled=True, blockxsize=256, blockysize=256, BIGTIFF="IF_SAFER")
    return path


def _paths_of(name: str | Path | Sequence[str | Path]) -> list[str]:
    if not isinstance(name, str | Path):
        return [str(one) for one in name]
    path = Path(name)
    if path.name == "mosaic" and (path.parent / "tiles").is_dir():
        path = path.parent  # of `canopy map`: an index that GDAL reads, of tiles that are read here
    if is_url(str(name)) or not (path.is_dir() or path.suffix.lower() == ".txt"):
        return [str(name)]
    if path.is_dir():
        for folder in (path / "chm", path / "tiles", path):
            files = (p for p in folder.glob("[!.]*") if p.suffix.lower() in (".tif", ".tiff", ".vrt"))
            if found := sorted(map(str, files)):
                return found
        expected = "*.tif, or chm/*.tif, or tiles/*.tif"
        raise ImageryError("no height tiles in the folder", where=name, expected=expected)
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ImageryError(
            "not a readable list of tiles", where=name, expected="one path per line"
        ) from error
    listed = [line for line in lines if line and not line.startswith("#")]
    if not listed:
        raise ImageryError("an empty list of tiles", where=name, expected="one path per line")
    return [line if is_url(line) else str(path.parent / line) for line in listed]


def _open_tile(path: str, band: int | str | None) -> Tile:
    with open_raster(path) as dataset:
        place = SourcePlace.of(dataset)
        bands = _height_bands(dataset, path, band)
        height = bands[0] - 1
        unit = (dataset.units[height] or "").strip()
        metres = _metres_per(unit)
        if metres is None:
            raise ImageryError(
                f"heights in {unit!r}", where=public_name(path),
                expected="metres, decimetres, centimetres, feet or US survey feet",
                remedy="write the band's true unit into the file",
            )  # fmt: skip
        integer = np.dtype(dataset.dtypes[height]).kind in "iu"
        scale, offset = (
            tuple(float(numbers[b - 1]) * metres for b in bands)
            for numbers in (dataset.scales, dataset.offsets)
        )
        published, mask = _published_as(dataset, path, place)
        says_missing = mask is not None or MaskFlags.all_valid not in dataset.mask_flag_enums[height]
        return Tile(
            path, place, bands, scale, offset, unit, abs(scale[0]) if integer else 0.0, published, mask,
            says_missing, dataset.nodatavals[height] == 0, dict(dataset.tags()),
        )  # fmt: skip


def _metres_per(unit: str) -> float | None:
    text = re.sub(r"[\s_-]+", " ", unit.lower().replace(".", ""))
    text = text.replace("meter", "metre").replace("feet", "foot")
    return METRES_PER_UNIT.get(text, METRES_PER_UNIT.get(text.removesuffix("s")))


def _height_bands(dataset: DatasetReader, path: str, wanted: int | str | None) -> tuple[int, ...]:
    """The height's band, and those of its interval: as asked for, else by description, else the only one."""
    names = [(text or "").strip() for text in dataset.descriptions]
    listed = ", ".join(f"{i} {name}".strip() for i, name in enumerate(names[:12], 1))
    usable = [i for i, colour in enumerate(dataset.colorinterp, 1) if colour != ColorInterp.alpha]
    telling = [i for i in usable if _SAYS_HEIGHT.search(names[i - 1])]
    if wanted is not None:
        text = str(wanted).strip()
        found = [i for i, name in enumerate(names, 1) if name and name.lower() == text.lower()]
        if not found and text.isdecimal() and 1 <= int(text) <= len(names):
            found = [int(text)]
        if len(found) != 1:
            raise ImageryError(
                f"no band {text!r}", where=public_name(path), expected=f"--band with one of {listed}"
            )
        height = found[0]
    elif "canopy_height" in names:
        height = names.index("canopy_height") + 1
    elif {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= set(dataset.colorinterp):
        expected = "a canopy height map in metres"
        raise ImageryError("a colour image", where=public_name(path), expected=expected)
    elif len(usable) == 1 or len(telling) == 1:
        height = usable[0] if len(usable) == 1 else telling[0]
    else:
        raise ImageryError(
            f"holds {len(names)} bands ({listed})", where=public_name(path),
            expected="one band, or one that says canopy height or CHM",
            remedy="name the height's with --band NUMBER or --band NAME",
        )  # fmt: skip
    if names[height - 1] == "canopy_height" and {"height_lower", "height_upper"} <= set(names):
        return height, names.index("height_lower") + 1, names.index("height_upper") + 1
    return (height,)


def _published_as(dataset: DatasetReader, path: str, place: SourcePlace) -> tuple[str | None, str | None]:
    """What a tile is published as, when name, place and pixels are those of such a one; and its mask file."""
    tile = Path(public_name(path))
    quadkey = tile.name.split(".", 1)[0]
    if not re.fullmatch(r"[0-3]{9,10}", quadkey) or dataset.dtypes[0] != "uint8" or place.crs.epsg != 3857:
        return None, None
    off = np.subtract(quadkey_bounds(quadkey), dataset.bounds)
    if not place.is_north_up or abs(off).max() > 2 * place.transform.a:
        return None, None
    published = PUBLISHED_ZOOM[len(quadkey)]
    masks = (folder / f"{tile.name}.msk" for folder in (tile.parent, tile.parent.parent / "msk"))
    has_mask = published == "published v1" and not is_url(path)
    return published, next((str(mask) for mask in masks if has_mask and mask.is_file()), None)


# ---- dates ----------------------------------------------------------------------------------------
_DAY = re.compile(r"(\d{4})-?(\d\d)?-?(\d\d)?")
# v2's date rasters hold years since 2000; a sample of them tells the span.
_SAMPLE_PX = 512


def years_apart(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Years between the middles of two date ranges (b minus a), None where one is unknown."""
    if not a or not b:
        return None
    return (_decimal(b[0]) + _decimal(b[-1])) / 2 - (_decimal(a[0]) + _decimal(a[-1])) / 2


def _decimal(text: str) -> float:
    match = _DAY.match(text)
    if match is None:
        return float("nan")
    year, month, day = (int(part) if part else None for part in match.groups())
    return float(year or 0) + (0.5 if month is None else (month - 1 + ((day or 15) - 1) / 31) / 12)


def _iso(text: str) -> Iterator[str]:
    """A date, month or year out of the ways that tags write them; nothing where there is none."""
    match = _DAY.match(text.strip().replace(":", "-", 2))
    if match:
        yield "-".join(piece for piece in match.groups() if piece)


def _dates_of(tile: Tile) -> Iterator[str]:
    """Dates in a file's tags, and in what lies beside a published tile.

    `../metadata/NAME.geojson` (v1: acq_date) or `../metadata/NAME.tif` (v2: year - 2000). A date that cannot
    be read is an unknown date, not a reason to refuse the heights.
    """
    for part in tile.tags.get("CANOPY_DATES", tile.tags.get("TIFFTAG_DATETIME", "")).split("/"):
        yield from _iso(part)
    if not tile.published or is_url(tile.path):
        return
    path = Path(tile.path)
    metadata = path.parent.parent / "metadata"
    with contextlib.suppress(OSError, ValueError, AttributeError, CanopyError):
        if tile.published == "published v1":
            text = (metadata / f"{path.name.split('.', 1)[0]}.geojson").read_text()
            for feature in json.loads(text).get("features", []):
                yield from _iso(str((feature.get("properties") or {}).get("acq_date", "")))
        else:
            with open_raster(metadata / path.name, georeferenced=False) as file:
                years = file.read(1, out_shape=(min(_SAMPLE_PX, file.height), min(_SAMPLE_PX, file.width)))
            yield from (str(2000 + int(year)) for year in np.unique(years) if 0 < year < 100)
