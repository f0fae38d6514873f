"""Opening height maps: which files they are, whose product, and what must be said of them."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rasterio.enums import MaskFlags
from rasterio.io import DatasetReader

from canopy import web
from canopy.errors import ImageryError
from canopy.evaluation.maps import DEFAULT_LEVEL, HeightMap, Tile, beside
from canopy.files import is_url, public_name
from canopy.geo.grid import quadkey_bounds
from canopy.geo.heights import height_bands
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster

if TYPE_CHECKING:
    import xarray

    HeightSource = str | Path | Sequence[str | Path] | xarray.DataArray

PUBLISHED_ZOOM = {9: "published v1", 10: "published v2"}


def open_heights(
    source: HeightSource,
    *,
    nodata: float | None = None,
    band: int | str | None = None,
    reference: bool = False,
    unit_m: float = 1.0,
) -> HeightMap:
    """Open a height map.

    Args:
        source: a GeoTIFF, COG or VRT (path or http URL); a folder of tiles (`DIR/chm`, `DIR/tiles` or DIR
            itself); a sequence of files; or an xarray DataArray with dimensions (y, x) or (band, y, x) and a
            CRS (`.rio.crs`).
        nodata: value that means missing, in place of what the files and the rules above say.
        band: number (from 1) or name of the height's band; by default the only one, or the only one that says
            canopy height or CHM.
        reference: maps are judged by it; see `HeightMap`.
        unit_m: metres per unit of files that say neither a unit nor a scale.

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
        tiles = [_open_tile(path, band, nodata, unit_m) for path in paths]
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
    import rasterio
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
    if units := array.attrs.get("units"):  # one, or one per band: rioxarray does not write them
        with rasterio.open(path, "r+") as written:
            each = {units} if isinstance(units, str) else set(units)
            written.units = tuple(each) * written.count if len(each) == 1 else tuple(units)
    return path


def _paths_of(name: str | Path | Sequence[str | Path]) -> list[str]:
    if not isinstance(name, str | Path):
        return [str(one) for one in name]
    path = Path(name)
    if path.name == "mosaic" and (path.parent / "tiles").is_dir():
        path = path.parent  # of `canopy map`: an index that GDAL reads, of tiles that are read here
    if is_url(str(name)) or not path.is_dir():
        return [str(name)]
    for folder in (path / "chm", path / "tiles", path):
        files = (p for p in folder.glob("[!.]*") if p.suffix.lower() in (".tif", ".tiff", ".vrt"))
        if found := sorted(map(str, files)):
            return found
    expected = "*.tif, or chm/*.tif, or tiles/*.tif"
    raise ImageryError("no height tiles in the folder", where=name, expected=expected)


def _open_tile(path: str, band: int | str | None, nodata: float | None, unit_m: float) -> Tile:
    with open_raster(path) as dataset:
        place, tags = SourcePlace.of(dataset), dict(dataset.tags())
        bands = height_bands(dataset, band, unit_m)
        height = bands.indexes[0] - 1
        published, mask = _published_as(dataset, path, place)
        silent = bool(published) and mask is None and MaskFlags.all_valid in dataset.mask_flag_enums[height]
        tile = Tile(path, place, bands, published, mask, silent, (), tags)
        notes = []
        if silent and any(outline for outline, _ in tile.acquisitions):
            notes.append("tiles without a mask: what lies outside the outlines of their images is not mapped")
        elif silent:
            tile = replace(tile, by_outlines=False)
            notes.append(
                "tiles without a mask or nodata value: 0 m and 'not mapped' cannot be told apart in them, "
                "and unmapped ground counts as open"
            )
        if published and nodata is None and dataset.nodatavals[height] == 0:
            notes.append("tiles declare 0 as missing, so open ground is left out of every number")
        if bands.step_m >= 0.5:
            notes.append(
                f"heights are whole multiples of {bands.step_m:g} m; whether rounded or cut is not known"
            )
        if len(bands.indexes) == 3 and "CANOPY_INTERVAL" not in tags:
            notes.append(f"its interval bands are taken for a {DEFAULT_LEVEL:.0%} interval")
        if bands.unit:
            notes.append(f"its heights are in {bands.unit} and were converted to metres")
        return replace(tile, notes=tuple(notes))


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
    if published != "published v1":
        return published, None
    own = f"{path}.msk" if not is_url(path) else ""
    places = (own, beside(path, "msk", ".tif.msk"))
    return published, next((mask for mask in places if mask and _exists(mask)), None)


def _exists(path: str) -> bool:
    return bool(web.peek(path, 1)[0]) if is_url(path) else Path(path).is_file()
