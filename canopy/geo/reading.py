"""Rasters that somebody else made: opened with few drivers and sane sizes, read with a truthful mask.

`open_raster` takes plain names, four formats and VRTs that are asked for by name. `read_window` gives the
pixels of an open dataset on any grid and says which are usable; it is the one reader of canopy.

Damaged JPEG data is decoded into wrong pixels and a line in GDAL's log, which neither GDAL's return codes nor
GDAL_ERROR_ON_LIBJPEG_WARNING (made for plain JPEG files) turn into an error. rasterio passes that line to its
logger in the reading thread, and that is where it is caught here.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from canopy.errors import ImageryError, InputError
from canopy.files import RASTER_SUFFIXES, check_name, gdal_name, is_url, public_name
from canopy.geo.collar import Collar
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace, shrink_factor
from canopy.geo.warp import resample

DRIVERS = ["GTiff", "JP2OpenJPEG", "PNG", "JPEG"]
# A whole-country mosaic at 0.5 m has ~2e12 samples but comes as a VRT of files; one file with more
# than 4e11 (632k square) is a mistake or an attack.
MAX_SAMPLES = 4e11
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
    if is_url(url := str(name).removeprefix("/vsicurl/")):
        from canopy.web import gdal_options

        options |= gdal_options(url)
    return rasterio.Env(**options)


def open_raster(path: str | Path, *, georeferenced: bool = True) -> DatasetReader:
    """Open a GeoTIFF/COG, JPEG 2000, PNG or JPEG, or a `.vrt`; a local path or an http(s) URL.

    A VRT is a program for GDAL, which can name any file and any driver: it is opened only where it was asked
    for by name, never under another suffix, and not when a source of its is missing. Refused are also names
    that GDAL would interpret (`/vsi...`, inline XML, `DRIVER:`) and files of more than 4e11 samples. Raises
    ImageryError naming the file.
    """
    name, where = gdal_name(path), public_name(path)
    drivers = DRIVERS
    if name.lower().split("?", 1)[0].endswith(".vrt"):
        if is_url(path):
            raise ImageryError("a remote VRT", where=where, remedy="download it first")
        _check_vrt(Path(name))
        drivers = ["VRT"]
    with raster_env(name), warnings.catch_warnings():
        # Without georeferencing nothing can be placed; that is said below in canopy's own words.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        dataset = _open_as(name, drivers)
        samples = dataset.width * dataset.height * dataset.count
    if not 0 < samples <= MAX_SAMPLES:
        dataset.close()
        raise ImageryError(
            f"declares {dataset.width} x {dataset.height} px x {dataset.count} bands",
            where=where,
            expected=f"1 to {MAX_SAMPLES:.0e} samples",
        )
    try:
        if georeferenced:
            check_georeference(dataset, where)
    except ImageryError:
        dataset.close()
        raise
    return dataset


def check_georeference(dataset: DatasetReader, label: str) -> None:
    """Refuse a raster without a geotransform, or with control points or RPCs in its place (ImageryError)."""
    if dataset.transform == Affine.identity():
        points = bool(dataset.gcps[0] or dataset.rpcs)
        raise ImageryError(
            "placed only by control points or rational polynomials" if points else "no georeferencing",
            where=label,
            expected="a geotransform (GeoTIFF tags or a world file)",
            remedy="orthorectify it first, for example with gdalwarp"
            if points
            else "georeference it first, for example with gdal_translate -a_ullr",
        )


def _check_vrt(path: Path, within: tuple[Path, ...] = ()) -> None:
    """Refuse a VRT with a source that is missing or no plain file, and one within itself.

    GDAL may complain about a missing source at the first read only, and give zeros from then on; after it has
    read a VRT that holds itself it does so for all VRTs of the process.
    """
    if path.resolve() in within:
        raise ImageryError("the VRT refers to itself", where=path)
    try:
        elements = list(ElementTree.parse(path).iter())
    except (OSError, ElementTree.ParseError) as error:
        raise ImageryError("not a readable VRT", where=path, expected="GDAL's XML") from error
    for element in elements:
        text = (element.text or "").strip()
        if element.tag not in ("SourceFilename", "SourceDataset") or is_url(text.removeprefix("/vsicurl/")):
            continue
        try:
            check_name(text)
        except ImageryError as error:
            raise ImageryError(f"the VRT refers to {error}", where=path) from error
        source = path.parent / text if element.get("relativeToVRT") == "1" else Path(text)
        if not source.is_file():
            raise ImageryError(f"the VRT refers to {text}, which is not there", where=path)
        if source.suffix.lower() == ".vrt":
            _check_vrt(source, (*within, path.resolve()))


def _open_as(name: str, drivers: list[str]) -> DatasetReader:
    """Open with the first driver that takes the file (rasterio.open allows one name at a time)."""
    reason = "no supported format recognised"
    for driver in drivers:
        try:
            return rasterio.open(name, driver=driver)
        except (RasterioError, OSError, ValueError) as error:
            # Drivers that do not know the format all say so; one that does says what is wrong.
            if "not recognized as being in a supported" not in str(error):
                reason = " ".join(str(error).split())[:160]
    known = Path(public_name(name)).suffix.lower() in RASTER_SUFFIXES
    raise ImageryError(
        f"not a readable raster ({reason})",
        where=public_name(name),
        expected="GeoTIFF, JPEG 2000, PNG, JPEG or .vrt",
        remedy=None if known or is_url(name) else "convert it, for example with rio convert FILE FILE.tif",
    )


# ---- damage -----------------------------------------------------------------------------------
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


# values (b, h, w) in the file's dtype, valid (h, w) -> the same after a palette, a placeholder test...
Decoder = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


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
    collar: Collar | None = None,
    overviews: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Bands `indexes` (1-based) of a dataset on `grid`: float32 (b, h, w) in the file's own units,
    unscaled, and valid (h, w), True = usable.

    When the grid shares the dataset's lattice (same CRS or one that differs by nothing, phase within
    1e-3 px) pixels are copied; on a lattice of whole multiples they are averaged; otherwise they are
    resampled once (`canopy.geo.warp`). A pixel's value never depends on the window it was asked in.
    Anything outside the dataset is invalid; rotated and south-up datasets come out north-up. Invalid
    values are 0.

    Args:
        resampling: None (average when shrinking by more than 1.5, else bilinear), "nearest" or "bilinear".
        nodata: replaces the file's own nodata value.
        crs: replaces the file's own CRS.
        decode: applied to source pixels before any resampling; see `Decoder`. Its bands are returned.
        colours: the bands are one colour. Then a nodata value that a colour can have (0 or more) means a
            missing pixel only where ALL bands have it: a black collar, not a dark pixel.
        collar: of a lossy file; it is missing.
        overviews: for a picture, read the file's own overview nearest to the grid, where it has one that is
            no coarser; a collar is not looked for in it.

    Validity is the intersection of the file's masks (internal, or a .msk file that carries GDAL's own
    mark; Meta's inverted .tif.msk does not and is ignored), alpha above 0, nodata in ANY band (but see
    `colours`), and finiteness; for every type of pixel.

    Raises ImageryError naming the file and the window when a block is truncated or damaged, and closes `ds`;
    an error is never turned into nodata. Use one dataset handle per thread.
    """
    place = SourcePlace.of(ds, crs).in_turn_of(grid)
    if overviews:
        shrink = shrink_factor(place, grid) * 1.01  # overviews of odd sizes shrink by a little more
        fitting = [level for level, factor in enumerate(ds.overviews(indexes[0])) if factor <= shrink]
        if fitting:
            with (
                raster_env(ds.name),
                rasterio.open(ds.name, driver=ds.driver, overview_level=fitting[-1]) as coarse,
            ):
                return read_window(
                    coarse, grid, indexes, resampling=resampling, nodata=nodata, crs=crs, decode=decode,
                    colours=colours,
                )  # fmt: skip

    def read(row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        reach = collar.reach_px if collar else 0
        top, left = max(row - reach, 0), max(col - reach, 0)
        bottom, right = min(row + height + reach, ds.height), min(col + width + reach, ds.width)
        window = Window(left, top, right - left, bottom - top)
        values, valid = read_native(ds, indexes, window, nodata, colours)
        if collar:
            valid &= ~collar.mask(values, top, left)
            here = np.s_[row - top : row - top + height, col - left : col - left + width]
            values, valid = values[:, *here], valid[here]
        return decode(values, valid) if decode else (values, valid)

    bands = len(indexes)
    if decode is not None:  # what it makes of one pixel tells how many bands there will be
        empty = np.zeros((bands, 1, 1), ds.dtypes[indexes[0] - 1])
        bands = decode(empty, np.zeros((1, 1), bool))[0].shape[0]
    try:
        with raster_env(ds.name):
            return resample(place, grid, read, bands, resampling)
    except ImageryError:
        # Wrong pixels may be in GDAL's block cache now, and a second read would not complain.
        ds.close()
        raise


# ---- whole rasters ----------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Raster:
    """values: float32 (bands, h, w); valid: bool (h, w), True = usable; grid: where the pixels are."""

    values: np.ndarray
    valid: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.shape[1:] != self.grid.shape:
            raise InputError(f"values {self.values.shape} on a grid of {self.grid.shape}")
        if self.valid.shape != self.grid.shape or self.valid.dtype != bool:
            raise InputError(
                f"valid {self.valid.dtype} {self.valid.shape} on a grid of {self.grid.shape}", expected="bool"
            )


def read_raster(
    path: str | Path, window: Grid | None = None, *, bands: Sequence[int] | None = None
) -> Raster:
    """A north-up GeoTIFF (any of our encodings, or anybody's map) as float32 in the band's unit.

    Scale and offset are applied; a pixel is valid where every read band is. `window` may be any grid:
    pixels are copied when it shares the file's lattice and resampled otherwise. `bands` are 1-based,
    by default all but an alpha band. Raises ImageryError.
    """
    with open_raster(path) as dataset:
        place = SourcePlace.of(dataset)
        grid = window if window is not None else place.grid()
        colors = enumerate(dataset.colorinterp, 1)
        indexes = list(bands) if bands else [i for i, c in colors if c != ColorInterp.alpha]
        values, valid = read_window(dataset, grid, indexes)
        scales = np.array([dataset.scales[i - 1] for i in indexes])[:, None, None]
        offsets = np.array([dataset.offsets[i - 1] for i in indexes])[:, None, None]
    if (scales != 1).any() or (offsets != 0).any():
        values = np.where(valid, values * scales + offsets, 0).astype(np.float32)
    return Raster(values, valid, grid)


# ---- source pixels ----------------------------------------------------------------------------
def read_native(
    ds: DatasetReader, indexes: Sequence[int], window: Window, nodata: float | None, colours: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Values (b, h, w) in the file's dtype and valid (h, w) of a window inside it; see `read_window`."""
    try:
        with gdal_complaints() as complaints:
            values = ds.read(list(indexes), window=window)
            valid = _mask_of(ds, indexes, window)
        reason: object = complaints[0] if complaints else None
    except (RasterioError, OSError, MemoryError) as error:
        reason = error.__cause__ or error
    if reason is not None:
        bottom, right = window.row_off + window.height, window.col_off + window.width
        raise ImageryError(
            f"unreadable pixels in rows {window.row_off}-{bottom}, columns {window.col_off}-{right} "
            f"({' '.join(str(reason).split())[:160]})",
            where=public_name(ds.name),
            remedy="the file is truncated or damaged; fetch it again",
        )
    if values.dtype.kind == "c":
        raise ImageryError("complex numbers", where=public_name(ds.name), expected="real bands")
    return values, valid & _is_data(ds, indexes, values, nodata, colours)


# How files describe near infrared, which GDAL calls alpha where it is the fourth band of bytes.
_INFRARED = re.compile(r"(?<![a-z])(nir|ir|infra[\s_-]*red)(?![a-z])", re.IGNORECASE)


def alpha_bands(ds: DatasetReader) -> list[int]:
    """Bands (1-based) that say where there is an image: of colour alpha, and not infrared by name."""
    named = zip(ds.colorinterp, ds.descriptions, strict=True)
    return [
        i
        for i, (c, text) in enumerate(named, 1)
        if c == ColorInterp.alpha and not _INFRARED.search(text or "")
    ]


def _mask_of(ds: DatasetReader, indexes: Sequence[int], window: Window) -> np.ndarray:
    """Internal masks and alpha, intersected (GDAL alone would let one hide the other)."""
    valid = np.ones((int(window.height), int(window.width)), dtype=bool)
    flags = ds.mask_flag_enums
    for alpha in alpha_bands(ds):
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
        # A mark as the band stores it: -3.4e38 in a float32 file is not the float64 number.
        stored = [(band, values.dtype.type(m) if is_float else m) for band, m in marked]
        valid &= ~together.reduce([band == m for band, m in stored])
    return valid
