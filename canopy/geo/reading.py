"""What a VRT may refer to. A VRT is a program for GDAL: it can name any file and any driver.

Opening rasters that somebody else made: few formats, plain names, sane sizes.

What GDAL only mutters about: damaged JPEG data is decoded into wrong pixels and a log line.

libtiff's JPEG decoder reports damage as a warning, which neither GDAL's return codes nor
GDAL_ERROR_ON_LIBJPEG_WARNING (made for plain JPEG files) turn into an error. rasterio passes the
warning to its logger in the reading thread, and that is where it is caught here.

Resampling that does not depend on the window asked for.

GDAL's warper chooses kernels, approximations and chunks from the window it is given, so the same pixel
can come out differently in two windows. Here every pixel's value is a function of the source and of
the pixel's place on the target's global lattice alone:

* positions: exact PROJ coordinates on every 16th lattice node, bilinear between them (the error is the
  projection's curvature over 16 px: microns at 0.6 m, below 0.005 px at 1 km);
* shrinking by more than 1.5: the mean over the target pixel, as a block mean on the source's own
  lattice followed by k x k bilinear samples;
* otherwise bilinear, Keys' cubic (a = -0.5), or nearest at the pixel's centre.

An output pixel is valid when its centre is within the source's frame and every source pixel that
enters its value is valid: nodata never bleeds into a value and never gets one. Beyond the frame's edge
the edge pixel is repeated, so that two files that touch leave no gap between them.

read_window: the pixels of an open dataset on any Grid. The one reader of canopy.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.env
from affine import Affine
from odc.geo import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from canopy.download import http_options
from canopy.errors import ImageryError, InputError
from canopy.files import check_name, gdal_name, is_url, public_name
from canopy.geo.crs import METRES_PER_DEGREE, ground_crs, metres_per_unit, transformer, x_period
from canopy.geo.grid import PHASE_TOL_PX, Grid

_SOURCE_TAGS = {"sourcefilename", "sourcedataset", "datasetname", "filename"}
_REFUSED_TAGS = {"pixelfunctioncode", "gdalwarpkernel", "processingsteps"}
MAX_BYTES = 256 * 2**20
MAX_DEPTH = 4


def check_vrt(path: Path, _depth: int = 0, _root: Path | None = None) -> None:
    """Raise ImageryError unless a VRT names only plain rasters beside or below it, or http(s) URLs.

    Refused: document types and entities, pixel functions with code, raw bands, absolute or `..` paths
    that leave the VRT's folder, `/vsi...` (but /vsicurl/http...), and VRTs nested deeper than four.
    """
    root = _root or path.resolve().parent
    if _depth > MAX_DEPTH:
        raise ImageryError(f"VRTs nested deeper than {MAX_DEPTH}", where=path)
    for element in _parse(path).iter():
        tag = element.tag.lower()
        kind = element.get("subClass", "")
        if tag in _REFUSED_TAGS or kind == "VRTRawRasterBand":
            raise ImageryError(f"a VRT with {kind or element.tag}", where=path, expected="plain sources")
        text = (element.text or "").strip()
        if tag in _SOURCE_TAGS and text:
            relative = element.get("relativeToVRT", element.get("relativetoVRT", "0")) == "1"
            source = _check_source(text, relative, path, root)
            if source is not None and source.suffix.lower() == ".vrt":
                check_vrt(source, _depth + 1, root)


def _parse(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImageryError("a VRT above 256 MiB", where=path)
        data = path.read_bytes()
        # Entities are how a small XML file becomes a large one, or reads other files.
        if re.search(rb"<!\s*(DOCTYPE|ENTITY)", data, re.IGNORECASE) or b"\0" in data:
            raise ImageryError("a VRT with a document type or entities", where=path)
        root = ElementTree.fromstring(data)
    except (OSError, ElementTree.ParseError) as error:
        raise ImageryError("not a readable VRT", where=path, expected="GDAL's XML") from error
    if root.tag != "VRTDataset":
        raise ImageryError(f"XML of kind {root.tag}", where=path, expected="VRTDataset")
    return root


def _check_source(text: str, relative: bool, vrt: Path, root: Path) -> Path | None:
    """A source's resolved path, None for a URL. Raises ImageryError when it is not allowed."""
    if is_url(text.removeprefix("/vsicurl/")):
        if text.lower().split("?", 1)[0].endswith(".vrt"):
            raise ImageryError("the VRT refers to a remote VRT", where=vrt)
        return None
    try:
        name = check_name(text)
    except ImageryError as error:
        raise ImageryError(f"the VRT refers to {error}", where=vrt) from error
    source = Path(os.path.realpath((vrt.parent if relative else Path.cwd()) / name))
    if not source.is_relative_to(root):
        raise ImageryError(
            f"the VRT refers to {name}, outside its own folder",
            where=vrt,
            expected="rasters beside or below the VRT, or http(s) URLs",
            remedy="move the VRT above its rasters",
        )
    if not source.is_file():
        # GDAL complains at the first read only, and gives zeros from then on.
        raise ImageryError(f"the VRT refers to {name}, which is not there", where=vrt)
    return source


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


_LOGGER = logging.getLogger("rasterio._err")
_DAMAGE = ("JPEGLib", "Corrupt JPEG", "TIFFReadEncoded", "libjpeg:", "Read error at")
_local = threading.local()


def _listen(record: logging.LogRecord) -> bool:
    """Keep messages about damage for the thread that is listening; let others see what they asked for."""
    heard = getattr(_local, "heard", None)
    if heard is not None:
        message = record.getMessage()
        if any(sign in message for sign in _DAMAGE):
            heard.append(message)
    parent = _LOGGER.parent
    return parent is None or record.levelno >= parent.getEffectiveLevel()


@contextmanager
def gdal_complaints() -> Iterator[list[str]]:
    """A list that fills with this thread's messages about damaged data while the block runs."""
    if _listen not in _LOGGER.filters:
        _LOGGER.addFilter(_listen)
        # Errors that GDAL recovers from are logged at INFO; the filter hides them from everyone else.
        _LOGGER.setLevel(logging.INFO)
    before, _local.heard = getattr(_local, "heard", None), []
    try:
        yield _local.heard
    finally:
        _local.heard = before


NODE_PX = 16
RESAMPLING = ("nearest", "bilinear", "cubic", "average")
AVERAGE_ABOVE = 1.5
# A neighbour with less weight than this neither adds to a value nor makes it invalid (float noise).
WEIGHT_TOL = 1e-3
STRIP_SAMPLES = 1 << 15

# (row0, col0, height, width) of the source -> values (b, h, w) any dtype, valid (h, w)
Reader = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]


# source (b, h, w) float32, valid (h, w), rows, cols in source pixels -> values (b, ...), valid (...)
# (valid None: all of it is)
Kernel = Callable[[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class WarpPlan:
    """How one source goes onto one target lattice; the same for every window of that lattice.

    `block`: side of the source blocks averaged first (1 = none); `samples`: k of k x k samples per
    target pixel; `kernel`: nearest, bilinear or cubic, on the block means.
    """

    place: SourcePlace
    kernel: str
    block: int
    samples: int


def plan_warp(place: SourcePlace, grid: Grid, resampling: str | None) -> WarpPlan:
    """Choose the steps from the scale at the source's centre, never from the window.

    `resampling` None means average when shrinking by more than 1.5, else bilinear.
    """
    if resampling is not None and resampling not in RESAMPLING:
        raise InputError(f"resampling {resampling!r}", expected=" or ".join(RESAMPLING))
    kernel = resampling or "average"
    if kernel in ("nearest", "cubic"):
        return WarpPlan(place, kernel, 1, 1)
    shrink = shrink_factor(place, grid.crs, grid.pixel)
    if kernel == "bilinear" or shrink <= AVERAGE_ABOVE:
        return WarpPlan(place, "bilinear", 1, 1)
    block = max(1, int(shrink / 2 + 1e-6))
    return WarpPlan(place, "bilinear", block, int(np.ceil(shrink / block - 1e-6)))


@lru_cache(maxsize=1024)
def shrink_factor(place: SourcePlace, crs: CRS, pixel: tuple[float, float]) -> float:
    """Source pixels per target pixel (geometric mean of both axes) at the source's centre."""
    row, col = place.height / 2, place.width / 2
    x, y = place.xy(np.array([row, row, row + 1]), np.array([col, col + 1, col]))
    x, y = transformer(place.crs, crs).transform(x, y)
    jacobian = np.array([[x[1] - x[0], x[2] - x[0]], [y[1] - y[0], y[2] - y[0]]])
    area = abs(np.linalg.det(jacobian)) / (pixel[0] * pixel[1])
    if not np.isfinite(area) or area == 0:
        # A source so large that its centre is out of the target's domain: compare sizes on the ground.
        source_size = abs(place.transform.determinant) ** 0.5 * _metres_per_unit(place.crs)
        return float(round((pixel[0] * pixel[1]) ** 0.5 * _metres_per_unit(crs) / source_size, 6))
    return float(round(area**-0.5, 6))


def _metres_per_unit(crs: CRS) -> float:
    return metres_per_unit(crs) if crs.projected else METRES_PER_DEGREE


def warp_window(plan: WarpPlan, grid: Grid, read: Reader, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 (bands, h, w) and valid (h, w) of a target window; `read` gives source pixels.

    `read` is asked only for windows inside the source.
    """
    values = np.zeros((bands, *grid.shape), dtype=np.float32)
    valid = np.zeros(grid.shape, dtype=bool)
    step = _chunk_px(plan)
    for row in range(0, grid.height, step):
        for col in range(0, grid.width, step):
            part = grid.window(row, col, min(step, grid.height - row), min(step, grid.width - col))
            done = _warp_chunk(plan, part, read)
            if done is not None:
                here = np.s_[row : row + part.height, col : col + part.width]
                values[:, *here], valid[here] = done
    return values, valid


def _chunk_px(plan: WarpPlan) -> int:
    """Side of a target chunk whose source is about 2048 px wide: memory does not grow with windows."""
    return max(64, 2048 // (plan.block * plan.samples))


def _warp_chunk(plan: WarpPlan, grid: Grid, read: Reader) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and valid of one chunk, or None when it lies outside the source."""
    rows, cols = source_positions(plan.place, grid, plan.samples)
    height, width = plan.place.height, plan.place.width
    with np.errstate(invalid="ignore"):
        inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    if not inside.any():
        return None
    reach = 2 * plan.block + 2
    r0, r1 = _span(rows, height, reach, plan.block)
    c0, c1 = _span(cols, width, reach, plan.block)
    if r0 >= r1 or c0 >= c1:
        return None
    source, source_valid = read(r0, c0, r1 - r0, c1 - c0)
    source = np.where(source_valid, source, 0).astype(np.float32)
    if plan.block > 1:
        source, source_valid = block_mean(source, source_valid, plan.block)
    rows, cols = (rows - r0) / plan.block, (cols - c0) / plan.block
    all_or_mask = None if source_valid.all() else source_valid
    values, valid = _in_strips(_KERNELS[plan.kernel], source, all_or_mask, rows, cols)
    return _gather_samples(values, valid, inside, plan.samples)


def _in_strips(
    kernel: Kernel, source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Run a kernel over a few rows at a time: its temporaries then stay in the processor's cache."""
    values = np.empty((source.shape[0], *rows.shape), dtype=np.float32)
    valid = np.empty(rows.shape, dtype=bool)
    step = max(1, STRIP_SAMPLES // rows.shape[1])
    for top in range(0, rows.shape[0], step):
        here = np.s_[top : top + step]
        values[:, here], valid[here] = kernel(source, source_valid, rows[here], cols[here])
    return values, valid


def _gather_samples(
    values: np.ndarray, valid: np.ndarray, inside: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of k x k samples; samples beyond the frame repeat its edge and have no say in validity."""
    if k == 1:
        valid = valid & inside
        return np.where(valid, values, 0), valid
    h, w = valid.shape[0] // k, valid.shape[1] // k
    centre = _centre_inside(inside.reshape(h, k, w, k), k)
    valid = (valid | ~inside).reshape(h, k, w, k).all(axis=(1, 3)) & centre
    mean = values.reshape(-1, h, k, w, k).mean(axis=(2, 4), dtype=np.float32)
    return np.where(valid, mean, 0), valid


def _centre_inside(inside: np.ndarray, k: int) -> np.ndarray:
    """Whether a pixel's centre is in the frame, told from its middle samples (h, k, w, k) -> (h, w)."""
    low, high = (k - 1) // 2, k // 2
    # For an even k the centre lies between four samples; the upper-left one stands for it, which
    # gives each pixel on a border between two files to exactly one of them or to both, never to none.
    return inside[:, low, :, low] | inside[:, high, :, high]


# ---- positions --------------------------------------------------------------------------------
def source_positions(place: SourcePlace, grid: Grid, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Source (row, col) of the centres of k x k sub-pixels, float64 (h*k, w*k); NaN where undefined.

    Corner convention: (0.5, 0.5) is the centre of the first source pixel.
    """
    row0, col0, row_phase, col_phase = grid.lattice
    sub_rows = row0 + (np.arange(grid.height * k) + 0.5) / k
    sub_cols = col0 + (np.arange(grid.width * k) + 0.5) / k
    node_rows = np.arange(row0 // NODE_PX, -(-(row0 + grid.height) // NODE_PX) + 1) * NODE_PX
    node_cols = np.arange(col0 // NODE_PX, -(-(col0 + grid.width) // NODE_PX) + 1) * NODE_PX
    px, py = grid.pixel
    x, y = np.meshgrid((node_cols + col_phase) * px, -(node_rows + row_phase) * py)
    if place.crs != grid.crs:
        x, y = transformer(grid.crs, place.crs).transform(x, y)
        x, y = np.where(np.isfinite(x), x, np.nan), np.where(np.isfinite(y), y, np.nan)
    ri, rf = _cells(sub_rows, node_rows[0])
    ci, cf = _cells(sub_cols, node_cols[0])
    period = x_period(place.crs)
    if period is None:
        nodes_r, nodes_c = place.rowcol(x, y)
        return _between(nodes_r, ri, rf, ci, cf), _between(nodes_c, ri, rf, ci, cf)
    # x jumps at the antimeridian: made continuous between nodes, then put where the source counts it.
    # Both by the source's own turn where they can be: the same sum, to the last bit, in every window.
    middle = place.xy(place.height / 2, place.width / 2)[0]
    finite = x[np.isfinite(x)]
    x = _in_turn(x, float(_in_turn(finite[:1], middle, period)[0]) if finite.size else middle, period)
    dense_x = _in_turn(_between(x, ri, rf, ci, cf), middle, period)
    return place.rowcol(dense_x, _between(y, ri, rf, ci, cf))


def _cells(position: np.ndarray, first_node: int) -> tuple[np.ndarray, np.ndarray]:
    """Node index and fraction of positions in lattice pixels."""
    in_nodes = position / NODE_PX
    whole = np.floor(in_nodes)
    return (whole - first_node // NODE_PX).astype(np.int64), in_nodes - whole


def _between(nodes: np.ndarray, ri: np.ndarray, rf: np.ndarray, ci: np.ndarray, cf: np.ndarray) -> np.ndarray:
    """Bilinear values between nodes, separably: rows first, then columns."""
    lines = nodes[ri] * (1 - rf)[:, None] + nodes[ri + 1] * rf[:, None]
    return lines[:, ci] * (1 - cf) + lines[:, ci + 1] * cf


def _in_turn(x: np.ndarray, middle: float, period: float) -> np.ndarray:
    """x moved by whole turns to within half a turn of `middle`."""
    return x - period * np.round((x - middle) / period)


def _span(position: np.ndarray, size: int, reach: int, block: int) -> tuple[int, int]:
    """Source interval that positions need, clipped to the source and widened to whole blocks."""
    finite = position[np.isfinite(position)]
    first = int(np.floor(np.clip(finite.min() - reach, 0, size))) // block * block
    last = int(np.ceil(np.clip(finite.max() + reach, 0, size)))
    return first, min(size, -(-last // block) * block)


# ---- kernels ----------------------------------------------------------------------------------
def block_mean(values: np.ndarray, valid: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (b, h, w) of block x block pixels and where all of a block is valid.

    The last row or column of blocks may be cut by the source's edge: their mean is over what exists.
    """
    _, h, w = values.shape
    pad_h, pad_w = -h % block, -w % block
    if pad_h or pad_w:  # repeat the means of what exists by padding with zero weight
        weight = np.pad(np.ones((h, w), np.float32), ((0, pad_h), (0, pad_w)))
        values = np.pad(values, ((0, 0), (0, pad_h), (0, pad_w)))
        valid = np.pad(valid, ((0, pad_h), (0, pad_w)), constant_values=True)
        count = _block_view(weight[None], block).sum(axis=(2, 4))
    else:
        count = np.float32(block * block)
    total = _block_view(values, block).sum(axis=(2, 4), dtype=np.float32)
    whole: np.ndarray = np.logical_and.reduce(_block_view(valid[None], block), axis=(2, 4))
    return total / count, whole[0]


def _block_view(array: np.ndarray, block: int) -> np.ndarray:
    b, h, w = array.shape
    return array.reshape(b, h // block, block, w // block, block)


def _taps(position: np.ndarray, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First tap's index (of `count`) and the fraction past tap count//2 - 1; NaN positions give 0."""
    centred = np.nan_to_num(position - 0.5, nan=0.0)
    centred = np.clip(centred, 0.0, size - 1.0)  # beyond the frame the edge pixel repeats
    whole = np.floor(centred)
    return whole.astype(np.int64) - (count // 2 - 1), (centred - whole).astype(np.float32)


def _nearest(
    source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    h, w = source.shape[1:]
    r = np.clip(np.floor(np.nan_to_num(rows)), 0, h - 1).astype(np.int64)
    c = np.clip(np.floor(np.nan_to_num(cols)), 0, w - 1).astype(np.int64)
    return source[:, r, c], np.ones(r.shape, dtype=bool) if source_valid is None else source_valid[r, c]


def _bilinear(
    source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r, fr = _taps(rows, source.shape[1], 2)
    c, fc = _taps(cols, source.shape[2], 2)
    return _weighted(source, source_valid, r, c, [1 - fr, fr], [1 - fc, fc])


def _cubic(
    source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys (1981), a = -0.5; bilinear where one of the outer twelve neighbours is invalid."""
    r, fr = _taps(rows, source.shape[1], 4)
    c, fc = _taps(cols, source.shape[2], 4)
    values, valid = _weighted(source, source_valid, r, c, _keys(fr), _keys(fc))
    near, near_valid = _bilinear(source, source_valid, rows, cols)
    return np.where(valid, values, near), near_valid


def _keys(t: np.ndarray) -> list[np.ndarray]:
    return [
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    ]


def _weighted(
    source: np.ndarray,
    source_valid: np.ndarray | None,
    row: np.ndarray,
    col: np.ndarray,
    row_weights: list[np.ndarray],
    col_weights: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of weighted taps, and where every tap that counts is valid."""
    h, w = source.shape[1:]
    flat = source.reshape(source.shape[0], -1)
    flat_valid = None if source_valid is None else source_valid.ravel()
    values = np.zeros((source.shape[0], *row.shape), dtype=np.float32)
    valid = np.ones(row.shape, dtype=bool)
    for i, row_weight in enumerate(row_weights):
        line = np.clip(row + i, 0, h - 1) * w
        for j, col_weight in enumerate(col_weights):
            index = line + np.clip(col + j, 0, w - 1)
            weight = row_weight * col_weight
            values += np.take(flat, index, axis=1) * weight
            if flat_valid is not None:
                valid &= flat_valid[index] | (np.abs(weight) < WEIGHT_TOL)
    return values, valid


_KERNELS = {"nearest": _nearest, "bilinear": _bilinear, "cubic": _cubic}


# values (b, h, w) in the file's dtype, valid (h, w) -> the same after a palette, a placeholder test...
Decoder = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class _DamagedImage(ImageryError):  # noqa: N818  (an ImageryError for everyone else)
    """Damage that GDAL only mentioned in its log."""


def read_window(
    ds: DatasetReader,
    grid: Grid,
    indexes: Sequence[int],
    *,
    resampling: str | None = None,
    nodata: float | None = None,
    crs: Any | None = None,
    decode: Decoder | None = None,
    colours: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Bands `indexes` (1-based) of a dataset on `grid`: float32 (b, h, w) in the file's own units,
    unscaled, and valid (h, w), True = usable.

    When the grid shares the dataset's lattice (same CRS or one that differs by nothing, phase within
    1e-3 px) pixels are copied; on a lattice of whole multiples they are averaged; otherwise they are
    resampled once (`canopy.geo.reading`). A pixel's value never depends on the window it was asked in.
    Anything outside the dataset is invalid; rotated and south-up datasets come out north-up. Invalid
    values are 0.

    Args:
        resampling: None (average when shrinking by more than 1.5, else bilinear), "nearest",
            "bilinear", "cubic" or "average".
        nodata: replaces the file's own nodata value.
        crs: replaces the file's own CRS.
        decode: applied to source pixels before any resampling; see `Decoder`. Its bands are returned.
        colours: the bands are one colour. Then a nodata value that a colour can have (0 or more) means a
            missing pixel only where ALL bands have it: a black collar, not a dark pixel.

    Validity is the intersection of the file's masks (internal, or a .msk file that carries GDAL's own
    mark; Meta's inverted .tif.msk does not and is ignored), alpha above 0, nodata in ANY band (but see
    `colours`), and finiteness; for every type of pixel.

    Raises ImageryError naming the file and the window when a block is truncated or damaged; an error
    is never turned into nodata. Damage that GDAL passes over in silence (JPEG data) also closes `ds`.
    Use one dataset handle per thread.
    """
    place = SourcePlace.of(ds, crs).in_turn_of(grid)

    def read(row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        values, valid = _read_native(ds, indexes, Window(col, row, width, height), nodata, colours)
        return decode(values, valid) if decode else (values, valid)

    bands = len(indexes) if decode is None else _decoded_bands(ds, indexes, decode)
    try:
        with raster_env(ds.name):
            ratio = lattice_ratio(place, grid)
            if ratio == 1 or (ratio is not None and resampling in (None, "average")):
                return copy_window(place, grid, read, bands, ratio)
            return warp_window(plan_warp(place, grid, resampling), grid, read, bands)
    except _DamagedImage:
        # The wrong pixels are in GDAL's block cache now, and a second read would not complain.
        ds.close()
        raise


def lattice_ratio(place: SourcePlace, grid: Grid) -> int | None:
    """n when each target pixel is exactly n x n source pixels (1: same lattice), else None.

    The answer holds for the whole lattice, not only for this window.
    """
    return _lattice_ratio(place, grid.crs, grid.pixel, grid.lattice[2:])


@lru_cache(maxsize=1024)
def _lattice_ratio(
    place: SourcePlace, crs: CRS, pixel: tuple[float, float], phase: tuple[float, float]
) -> int | None:
    if not place.is_north_up or not _same_place(place, crs):
        return None
    source_px, source_py = place.transform.a, -place.transform.e
    ratio = round(pixel[0] / source_px)
    # The drift over the whole dataset must stay below the tolerance, not only that of one pixel.
    longest = max(place.height, place.width)
    for target, source in zip(pixel, (source_px, source_py), strict=True):
        if ratio < 1 or abs(target / source / ratio - 1) * longest > PHASE_TOL_PX:
            return None
    # Where the source's corner lies on the target's lattice, in source pixels from a target corner.
    col = (place.transform.c / pixel[0] - phase[1]) * ratio
    row = (-place.transform.f / pixel[1] - phase[0]) * ratio
    # Rounding of `phase` (1e-6 target px) is far inside the tolerance.
    return ratio if max(abs(col - round(col)), abs(row - round(row))) < PHASE_TOL_PX else None


def _same_place(place: SourcePlace, crs: CRS) -> bool:
    """Whether coordinates mean the same in both CRSs, within 1e-3 px over the whole dataset."""
    if place.crs == crs:
        return True
    if place.crs.geographic != crs.geographic:
        return False
    cols, rows = np.meshgrid(np.linspace(0, place.width, 5), np.linspace(0, place.height, 5))
    x, y = place.xy(rows.ravel(), cols.ravel())
    tx, ty = transformer(place.crs, crs).transform(x, y)
    limit_x, limit_y = PHASE_TOL_PX * place.transform.a, PHASE_TOL_PX * -place.transform.e
    return bool(np.all(np.abs(tx - x) < limit_x) and np.all(np.abs(ty - y) < limit_y))


def copy_window(
    place: SourcePlace, grid: Grid, read: Decoder | Callable, bands: int, ratio: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a shared (or n times coarser) lattice, padded by hand: rasterio shrinks silently."""
    row, col = (round(v) for v in place.rowcol(*grid.xy(0, 0)))
    if ratio == 1:
        return _frame(place, read, bands, (row, col, *grid.shape), ratio)
    values = np.zeros((bands, *grid.shape), dtype=np.float32)
    valid = np.zeros(grid.shape, dtype=bool)
    step = max(1, 4096 // ratio)
    for top in range(0, grid.height, step):
        for left in range(0, grid.width, step):
            h, w = min(step, grid.height - top), min(step, grid.width - left)
            r0, c0 = row + top * ratio, col + left * ratio
            part = _frame(place, read, bands, (r0, c0, h * ratio, w * ratio), ratio)
            here = np.s_[top : top + h, left : left + w]
            values[:, *here], valid[here] = part
    return values, valid


def _frame(
    place: SourcePlace, read: Callable, bands: int, window: tuple[int, int, int, int], ratio: int
) -> tuple[np.ndarray, np.ndarray]:
    """One source window, padded with invalid pixels, averaged over ratio x ratio.

    A coarse pixel cut by the source's edge counts when its centre is inside, as everywhere in canopy.
    """
    r0, c0, h, w = window
    values = np.zeros((bands, h, w), dtype=np.float32)
    valid = np.zeros((h, w), dtype=bool)
    inside = np.zeros((h, w), dtype=bool)
    top, left = max(r0, 0), max(c0, 0)
    bottom, right = min(r0 + h, place.height), min(c0 + w, place.width)
    if bottom > top and right > left:
        got, good = read(top, left, bottom - top, right - left)
        here = np.s_[top - r0 : bottom - r0, left - c0 : right - c0]
        values[:, *here] = got if good.all() else np.where(good, got, 0)
        valid[here], inside[here] = good, True
    if ratio == 1:
        return values, valid
    share, _ = block_mean(inside[None].astype(np.float32), inside, ratio)
    mean, whole = block_mean(values, valid | ~inside, ratio)
    low, high = (ratio - 1) // 2, ratio // 2
    centre = inside[low::ratio, low::ratio] | inside[high::ratio, high::ratio]
    good = whole & centre
    return np.where(good, mean / np.maximum(share, 1e-9), 0), good


# ---- source pixels ----------------------------------------------------------------------------
def _read_native(
    ds: DatasetReader, indexes: Sequence[int], window: Window, nodata: float | None, colours: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Values (b, h, w) in the file's dtype and valid (h, w) of a window inside the dataset."""
    shape = (int(window.height), int(window.width))
    try:
        with gdal_complaints() as complaints:
            values = ds.read(list(indexes), window=window)
            valid = _mask_of(ds, indexes, window)
    except (RasterioError, OSError, MemoryError) as error:
        raise _damaged(ds, window, error.__cause__ or error) from error
    if complaints:
        raise _damaged(ds, window, complaints[0], _DamagedImage)
    if values.shape[1:] != shape:
        raise ImageryError(
            f"read {values.shape[2]} x {values.shape[1]} px instead of {shape[1]} x {shape[0]}",
            where=public_name(ds.name),
        )
    if values.dtype.kind == "c":
        raise ImageryError("complex numbers", where=public_name(ds.name), expected="real bands")
    return values, valid & _is_data(ds, indexes, values, nodata, colours)


def _damaged(
    ds: DatasetReader, window: Window, reason: object, kind: type[ImageryError] = ImageryError
) -> ImageryError:
    bottom, right = window.row_off + window.height, window.col_off + window.width
    return kind(
        f"unreadable pixels in rows {window.row_off}-{bottom}, columns {window.col_off}-{right} "
        f"({' '.join(str(reason).split())[:160]})",
        where=public_name(ds.name),
        remedy="the file is truncated or damaged; fetch it again",
    )


def _mask_of(ds: DatasetReader, indexes: Sequence[int], window: Window) -> np.ndarray:
    """Internal masks and alpha, intersected (GDAL alone would let one hide the other)."""
    valid = np.ones((int(window.height), int(window.width)), dtype=bool)
    flags = ds.mask_flag_enums
    for alpha in (i for i, c in enumerate(ds.colorinterp, 1) if c == ColorInterp.alpha):
        valid &= ds.read(alpha, window=window) > 0
    masked = [
        i for i in indexes if not {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha} & {*flags[i - 1]}
    ]
    if masked:
        shared = all(MaskFlags.per_dataset in flags[i - 1] for i in masked)
        for index in masked[:1] if shared else masked:
            valid &= ds.read_masks(index, window=window) > 0
    return valid


def _is_data(
    ds: DatasetReader, indexes: Sequence[int], values: np.ndarray, nodata: float | None, colours: bool
) -> np.ndarray:
    """Finite and not nodata; see `read_window` for the any/all rule."""
    is_float = values.dtype.kind == "f"
    valid = np.isfinite(values).all(axis=0) if is_float else np.ones(values.shape[1:], dtype=bool)
    marks = [ds.nodatavals[i - 1] if nodata is None else nodata for i in indexes]
    marked = [(band, m) for band, m in zip(values, marks, strict=True) if m is not None and m == m]
    if marked:
        # Bands without a mark cannot veto: a collar is where the marked ones agree.
        together = np.logical_and if colours and min(m for _, m in marked) >= 0 else np.logical_or
        valid &= ~together.reduce([band == _as_dtype(m, values.dtype) for band, m in marked])
    return valid


def _as_dtype(mark: float, dtype: np.dtype) -> Any:
    """A nodata mark as the band stores it (-3.4e38 in a float32 file is not the float64 number)."""
    return dtype.type(mark) if dtype.kind == "f" else mark


def _decoded_bands(ds: DatasetReader, indexes: Sequence[int], decode: Decoder) -> int:
    """How many bands `decode` makes, told from one empty pixel."""
    dtype = ds.dtypes[indexes[0] - 1]
    return decode(np.zeros((len(indexes), 1, 1), dtype), np.zeros((1, 1), bool))[0].shape[0]
