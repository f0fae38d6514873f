"""Opening rasters that somebody else made: few formats, plain names, sane sizes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.env
from affine import Affine
from odc.geo import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from canopy.errors import ImageryError
from canopy.geo.crs import ground_crs, x_period
from canopy.geo.gdal_http import http_options
from canopy.geo.grid import Grid
from canopy.geo.paths import gdal_name, is_url, public_name
from canopy.geo.vrt import check_vrt

DRIVERS = ["GTiff", "JP2OpenJPEG", "PNG", "JPEG"]
# A whole-country mosaic at 0.5 m has ~2e12 samples but comes as a VRT of files; one file with more
# than 4e11 (632k square) is a mistake or an attack.
MAX_SAMPLES = 4e11
# One block is decoded at once: a header that declares a larger one would take the machine's memory.
MAX_BLOCK_BYTES = 2**31
# Process-wide cap of GDAL's block cache, in BYTES (an int below 100000 would mean almost no cache).
# Small enough to be full on any raster worth the name: peak memory then is the same for all of them.
CACHE_BYTES = 96 * 2**20


def raster_env(name: str | Path = "") -> rasterio.Env:
    """The GDAL settings every open and read happens under, for a file or an http(s) URL.

    Damaged JPEG data is an error instead of wrong pixels; VRTs run no Python; a remote file is one
    file (its folder is not listed, no sidecars are asked for).
    """
    options: dict[str, Any] = {
        "GDAL_CACHEMAX": CACHE_BYTES,
        "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",
        "GDAL_VRT_ENABLE_PYTHON": "NO",
        "GDAL_VRT_ENABLE_RAWRASTERBAND": "NO",
    }
    # Whoever reads remote files with a patience of their own has set it around this.
    if is_url(str(name).removeprefix("/vsicurl/")) and not _speaks_http():
        options |= http_options()
    return rasterio.Env(**options)


def _speaks_http() -> bool:
    return rasterio.env.hasenv() and "GDAL_HTTP_TIMEOUT" in rasterio.env.getenv()


def open_raster(path: str | Path, *, georeferenced: bool = True) -> DatasetReader:
    """Open a GeoTIFF/COG, JPEG 2000, PNG or JPEG, or a `.vrt`; a local path or an http(s) URL.

    A VRT hidden under another suffix is refused, as are names that GDAL would interpret (`/vsi...`,
    inline XML, `DRIVER:`), VRTs that reach outside their folder, and absurd declared sizes: more than
    4e11 samples, a block above 2 GiB, or a TIFF with more blocks than its bytes could index.
    Raises ImageryError naming the file.
    """
    name = gdal_name(path)
    drivers = DRIVERS
    if name.lower().split("?", 1)[0].endswith(".vrt"):
        if is_url(path):
            raise ImageryError("a remote VRT", where=public_name(path), remedy="download it first")
        check_vrt(Path(name))
        drivers = ["VRT"]
    with raster_env(name), warnings.catch_warnings():
        # Without georeferencing nothing can be placed; that is said below in canopy's own words.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        dataset = _open_as(name, drivers)
        try:
            _check_size(dataset, path)
            if georeferenced and dataset.transform == Affine.identity():
                raise ImageryError(
                    "no georeferencing",
                    where=public_name(path),
                    expected="a geotransform (world file, GeoTIFF tags)",
                    remedy="georeference the image first, e.g. with gdal_translate -a_ullr",
                )
        except ImageryError:
            dataset.close()
            raise
    return dataset


def _open_as(name: str, drivers: list[str]) -> DatasetReader:
    """Open with the first driver that takes the file (rasterio.open allows one name at a time)."""
    reason = "no supported format recognised"
    for driver in drivers:
        try:
            return rasterio.open(name, driver=driver)
        except (RasterioError, OSError, ValueError) as error:
            # Drivers that do not know the format all say so; one that does says what is wrong.
            if "not recognized as being in a supported" not in str(error):
                reason = _reason(error)
    raise ImageryError(
        f"not a readable raster ({reason})",
        where=public_name(name),
        expected="GeoTIFF, JPEG 2000, PNG, JPEG or .vrt",
    )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def _check_size(dataset: DatasetReader, path: str | Path) -> None:
    """Refuse sizes that the file cannot honestly hold; see `open_raster`."""
    where = public_name(path)
    samples = dataset.width * dataset.height * dataset.count
    if dataset.count < 1 or samples > MAX_SAMPLES:
        raise ImageryError(
            f"declares {dataset.width} x {dataset.height} px x {dataset.count} bands",
            where=where,
            expected=f"1 to {MAX_SAMPLES:.0e} samples",
        )
    block_h, block_w = dataset.block_shapes[0]
    itemsize = 16 if "complex" in dataset.dtypes[0] else 8 if "64" in dataset.dtypes[0] else 4
    if block_h * block_w * itemsize > MAX_BLOCK_BYTES:
        raise ImageryError(
            f"declares blocks of {block_w} x {block_h} px", where=where, expected="under 2 GiB"
        )
    if dataset.driver == "GTiff" and not is_url(path):
        # Each block's place in the file takes at least four bytes of the file.
        blocks = -(-dataset.height // block_h) * -(-dataset.width // block_w)
        if 4 * blocks > max(Path(path).stat().st_size, 1 << 16):
            raise ImageryError(
                f"declares {blocks} blocks in {Path(path).stat().st_size} bytes",
                where=where,
                remedy="the file is damaged or forged; fetch it again",
            )


@dataclass(frozen=True)
class SourcePlace:
    """Where a dataset's pixels are: any affine (rotated and south-up too), CRS, height and width."""

    transform: Affine
    crs: CRS
    height: int
    width: int

    @classmethod
    def of(cls, dataset: DatasetReader, crs: Any | None = None) -> SourcePlace:
        """The place of an open dataset; `crs` replaces a missing (or wrong) one. Raises InputError."""
        given = crs if crs is not None else dataset.crs
        if not given:
            raise ImageryError(
                "no coordinate reference system",
                where=public_name(dataset.name),
                remedy="name one with --crs, e.g. --crs EPSG:32610",
            )
        if dataset.transform.determinant == 0:
            raise ImageryError("a geotransform without area", where=public_name(dataset.name))
        place = cls(dataset.transform, ground_crs(given, public_name(dataset.name)), *dataset.shape)
        place._check_degrees(public_name(dataset.name))
        return place

    def _check_degrees(self, name: str) -> None:
        """Refuse degrees beyond the poles or far beyond a turn: metres in a file that is tagged EPSG:4326."""
        if not self.crs.geographic:
            return
        turn = x_period(self.crs) or 360.0
        x, y = self.xy(np.array([0, 0, self.height, self.height]), np.array([0, self.width, 0, self.width]))
        # Grids of the whole Earth may reach over the pole by half a pixel, and count from any meridian.
        pixel = abs(self.transform.d) + abs(self.transform.e)
        if abs(y).max() > turn / 4 + pixel or abs(x).max() > 1.5 * turn:
            raise ImageryError(
                f"x {x.min():.10g} to {x.max():.10g}, y {y.min():.10g} to {y.max():.10g} in {self.crs}",
                where=name,
                expected="degrees in a CRS of degrees",
                remedy="the file's CRS is wrong: set the one its coordinates are in, for example with "
                "gdal_edit.py -a_srs EPSG:32610",
            )

    @property
    def is_north_up(self) -> bool:
        """Whether a `Grid` can hold it as it is."""
        t = self.transform
        return t.a > 0 and t.e < 0 and abs(t.b) <= 1e-9 * t.a and abs(t.d) <= 1e-9 * -t.e

    def north_up(self) -> SourcePlace:
        """The same place with rows from north to south, if only their order is against it; else itself."""
        t = self.transform
        if t.a <= 0 or t.e <= 0 or t.b or t.d:
            return self
        turned = Affine(t.a, 0.0, t.c, 0.0, -t.e, t.f + t.e * self.height)
        return replace(self, transform=turned)

    def xy(self, row: Any, col: Any) -> tuple[Any, Any]:
        """World x, y of pixel-space points (numbers or arrays); (0, 0) is a corner, (0.5, 0.5) a centre."""
        t = self.transform
        return t.a * col + t.b * row + t.c, t.d * col + t.e * row + t.f

    def rowcol(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Pixel-space row, col of world points: the inverse of `xy`."""
        t = ~self.transform
        return t.d * x + t.e * y + t.f, t.a * x + t.b * y + t.c

    def in_turn_of(self, grid: Grid) -> SourcePlace:
        """The same place, moved by whole turns round the Earth to where `grid` counts them."""
        period = x_period(self.crs)
        if period is None or period != x_period(grid.crs):
            return self
        middle = self.xy(self.height / 2, self.width / 2)[0]
        turns = round((sum(grid.bounds[0::2]) / 2 - middle) / period)
        t = self.transform
        return self if not turns else replace(self, transform=Affine(t.a, t.b, t.c + period * turns, *t[3:6]))

    def grid(self) -> Grid:
        """As a Grid. Raises InputError when rotated, sheared or south-up."""
        return Grid.of(self.crs, self.transform, (self.height, self.width))
