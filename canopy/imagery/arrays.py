"""An xarray DataArray with a CRS as a source: the same rules for bands, nodata and white as for files."""

from __future__ import annotations

import itertools
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.dtypes import check_dtype, in_dtype_range
from rasterio.io import MemoryFile
from shapely.geometry import box

from canopy.errors import CanopyError, ImageryError
from canopy.geo.area import AOI
from canopy.geo.crs import ground_crs, to_lonlat
from canopy.geo.grid import Grid
from canopy.imagery.bands import BandPlan, check_nodata, check_options, pixel_notes, plan_bands
from canopy.imagery.base import WHITE, ReadOptions
from canopy.imagery.files import Mosaic, read_lattice
from canopy.imagery.names import acquisition_date
from canopy.imagery.scene import Outline, Pixels, as_colour

if TYPE_CHECKING:
    import xarray

_EXPECTED = "a DataArray (band, y, x) with a CRS, as rioxarray.open_rasterio gives it"
_PROBE_PX = 256
_numbers = itertools.count(1)


def open_array(array: Any, options: ReadOptions) -> Mosaic:
    """Open a DataArray; lazy ones are computed window by window.

    Args:
        array: (band, y, x) in any order, with even x and y coordinates and a CRS for `.rio`.
        options: how to read it; `crs` goes before the array's own.

    Raises:
        ImageryError: no CRS, no even coordinates, or no bands that are red, green and blue.
    """
    check_options(options)
    import rioxarray  # noqa: F401  (gives arrays their `.rio`)

    name = str(array.encoding.get("source") or array.attrs.get("imagery") or f"DataArray {next(_numbers)}")
    bands = _north_up(array, name)
    lattice = _lattice(bands, name, options)
    scale, own = _white(bands, options), bands.rio.nodata
    own = own if own is not None and in_dtype_range(own, bands.dtype.name) else None
    nodata = own if options.nodata is None else options.nodata
    with MemoryFile() as memory:
        _write_probe(memory, bands, name, own)
        with memory.open() as probe:
            plan = plan_bands(probe, where=name, bands=options.bands, scale=scale)
            check_nodata(probe, plan, options.nodata, name)
            notes = [*plan.notes, *(pixel_notes(probe, plan, name, options.nodata) or [])]
    layer = _ArrayLayer(bands, lattice, plan, nodata, name)
    return Mosaic(
        [layer],
        name=name,
        native_crs=lattice.crs,
        native_gsd_m=lattice.gsd_m,
        native_grid=lattice,
        outline=AOI.from_grid(lattice),
        notes=notes,
    )


def _north_up(array: Any, name: str) -> xarray.DataArray:
    """The array as (band, y, x), rows from north to south."""
    try:
        x, y = array.rio.x_dim, array.rio.y_dim
        others = [dim for dim in array.dims if dim not in (x, y)]
    except Exception as error:  # rioxarray has no common root of its errors
        raise ImageryError(f"no x and y dimensions ({error})", where=name, expected=_EXPECTED) from None
    if type(array).__name__ != "DataArray" or len(others) > 1:
        found = f"a {type(array).__name__} with dimensions {', '.join(map(str, array.dims))}"
        raise ImageryError(found, where=name, expected=_EXPECTED)
    bands = array if others else array.expand_dims("band")
    bands = bands.transpose(*(others or ["band"]), y, x)
    if bands.sizes[y] > 1 and y in bands.coords and bands[y][0] < bands[y][-1]:
        bands = bands.isel({y: slice(None, None, -1)})
    return bands


def _lattice(bands: Any, name: str, options: ReadOptions) -> Grid:
    crs = options.crs or bands.rio.crs or options.fallback_crs
    if crs is None:
        raise ImageryError(
            "no coordinate reference system",
            where=name,
            expected=_EXPECTED,
            remedy='set it with array.rio.write_crs("EPSG:32610")',
        )
    _, y, x = bands.dims
    if x not in bands.coords or y not in bands.coords:
        raise ImageryError("no x and y coordinates", where=name, expected=_EXPECTED)
    for axis in (x, y):
        steps = np.diff(bands[axis].values.astype(float))
        if not steps.size or abs(steps - steps.mean()).max() > 0.01 * abs(steps.mean()):
            raise ImageryError(f"uneven {axis} coordinates", where=name, expected="a regular grid of pixels")
    try:
        transform = Affine(*bands.rio.transform(recalc=True)[:6])
        return Grid.of(ground_crs(crs, name), transform, (bands.sizes[y], bands.sizes[x]))
    except CanopyError as error:
        raise ImageryError(error.what, where=name, expected=error.expected) from None


def _white(bands: Any, options: ReadOptions) -> float | None:
    """What means white: as said, as the array says, or 255 for uint8 that was made float to hold NaN."""
    if options.scale is not None:
        return options.scale
    stored = bands.encoding.get("rasterio_dtype") or bands.encoding.get("dtype")
    if bands.dtype.kind == "f" and stored is not None and np.dtype(stored) == np.uint8:
        return 255.0
    return bands.attrs.get(WHITE)


def _write_probe(memory: MemoryFile, bands: Any, name: str, nodata: float | None) -> None:
    """Corners, middles of the edges and centre of the array as a small file, for the checks of files."""
    if not check_dtype(bands.dtype.name):
        raise ImageryError(f"pixels of type {bands.dtype}", where=name, expected="uint8 colour")
    index = {dim: _probed(bands.sizes[dim]) for dim in bands.dims[1:]}
    values = bands.isel(index).values
    count, height, width = values.shape
    own = bands.attrs.get("long_name", "")
    described = own if isinstance(own, (tuple, list)) else bands.coords.get(bands.dims[0], [""] * count)
    profile = {
        "driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype.name,
        "nodata": nodata, "photometric": "RGB" if count == 3 else "MINISBLACK", "ALPHA": "NO",
        "transform": Affine.scale(1, -1), "crs": "EPSG:3857",
    }  # fmt: skip
    with memory.open(**profile) as dataset:
        dataset.write(values)
        for number, text in enumerate(described, 1):
            text = str(getattr(text, "item", lambda text=text: text)())
            if not text.isdigit():
                dataset.set_band_description(number, text)


def _probed(size: int) -> NDArray[np.intp]:
    if size <= 3 * _PROBE_PX:
        return np.arange(size)
    middle = (size - _PROBE_PX) // 2
    return np.concatenate([np.arange(_PROBE_PX) + start for start in (0, middle, size - _PROBE_PX)])


class _ArrayLayer:
    """The layer of a mosaic that an array is."""

    def __init__(
        self, bands: xarray.DataArray, lattice: Grid, plan: BandPlan, nodata: float | None, scene_id: str
    ) -> None:
        self._bands, self._lattice, self._plan, self._nodata = bands, lattice, plan, nodata
        self.scene_id = scene_id
        self.day: date | None = acquisition_date({k: str(v) for k, v in bands.attrs.items()}, scene_id)

    def outline(self) -> Outline:
        """Where the array is, EPSG:4326."""
        return to_lonlat(box(*self._lattice.bounds), self._lattice.crs)

    def read(self, grid: Grid) -> Pixels | None:
        """RGB in 0..1 and validity on `grid`."""
        values, valid = read_lattice(self._window, self._lattice, grid)
        return as_colour(values, valid, self._plan.divisor), valid

    def _window(self, window: Grid) -> tuple[np.ndarray, NDArray[np.bool_]]:
        row, col = self._lattice.offset_of(window)
        _, y, x = self._bands.dims
        part = self._bands.isel({y: slice(row, row + window.height), x: slice(col, col + window.width)})
        alpha = [] if self._plan.alpha is None else [self._plan.alpha]
        stored = part.isel({part.dims[0]: [i - 1 for i in (*self._plan.indexes, *alpha)]}).values
        values, valid = stored[:3], np.isfinite(stored).all(axis=0)
        if alpha:
            valid &= stored[3] > 0
        mark = self._nodata
        if mark is not None and mark == mark:
            # A value that a colour can have means a missing pixel only where all three have it.
            marked = values == values.dtype.type(mark)
            valid &= ~(marked.all(axis=0) if mark >= 0 else marked.any(axis=0))
        return np.where(valid, values, 0), valid
