"""CogWriter: windows in, a Cloud-Optimized GeoTIFF out that has been read back, or nothing at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.errors import RasterioError
from rasterio.windows import Window

from canopy.errors import CanopyError, InputError, OutputError
from canopy.files import check_output, file_sha256, flush, told_as_output
from canopy.geo.grid import Grid
from canopy.geo.reading import raster_env

BLOCK = 512
OVERVIEWS = ("average", "mode")
# The uncompressed scratch file, overviews and the result stand side by side for a moment.
SCRATCH_FACTOR = 2.4
# Deflate's level 6 takes twice as long as 3 for files 2 % (float32) to 4 % (uint16cm) smaller.
LEVEL = 3
SCRATCH_EXTRA = 16 * 2**20


# ---- how metres are stored ------------------------------------------------------------------------
@dataclass(frozen=True)
class BandSpec:
    """Name and unit of an output band."""

    name: str
    unit: str = "m"


@dataclass(frozen=True)
class Encoding:
    """dtype, nodata, step in metres, and the largest storable step (nodata lies above it)."""

    name: str
    dtype: str
    nodata: float
    step_m: float
    top: int

    def scale_of(self, band: BandSpec) -> float:
        """Worth of one stored step of a band: of metres the encoding's, of other units (days, classes) 1."""
        return self.step_m if band.unit == "m" else 1.0

    def encode(self, values: np.ndarray, valid: np.ndarray, scales: list[float]) -> np.ndarray:
        """float32 (b, h, w) and valid (h, w) -> stored numbers; invalid pixels become nodata.

        Compact steps are rounded half to even and clipped to 0..top: a valid height is never nodata.
        """
        if self.dtype == "float32":
            return np.where(valid, values, np.float32(np.nan)).astype(np.float32, copy=False)
        factors = np.asarray(scales, dtype=np.float64)[:, None, None]
        steps = np.clip(np.rint(np.where(valid, values, 0) / factors), 0, self.top)
        return np.where(valid, steps, self.nodata).astype(self.dtype)


ENCODINGS = {
    e.name: e
    for e in (
        Encoding("float32", "float32", float("nan"), 1.0, 0),
        Encoding("uint16cm", "uint16", 65535, 0.01, 65534),
        Encoding("uint8m", "uint8", 255, 1.0, 254),
    )
}


def encoding_named(name: str) -> Encoding:
    """The encoding of a name. Raises InputError listing the names."""
    if name not in ENCODINGS:
        raise InputError(f"encoding {name!r}", where="--encoding", expected=", ".join(ENCODINGS))
    return ENCODINGS[name]


# ---- the writer -----------------------------------------------------------------------------------
class CogWriter:
    """Write a raster window by window; a context manager.

    The pixels go to a tiled scratch file in a hidden `.NAME.*.partial` folder beside `path`. On a clean
    exit GDAL's COG driver makes the map of it (512 px blocks, deflate, averaged overviews), which is opened
    again, read once from end to end, hashed, flushed to disk, and only then renamed to `path`. On an
    exception everything is removed and `path` is as before. Memory does not depend on the raster's size.
    What is never written is nodata. The bytes depend on the pixels, grid, bands and tags alone, not on the
    order or size of the windows.

    Args:
        path: the file to make.
        grid: its place.
        bands: one `BandSpec` per band; all share the encoding's dtype.
        encoding: "float32" (nodata NaN), "uint16cm" (0.01 m, 0 to 655.34 m, nodata 65535) or "uint8m"
            (1 m, 0 to 254 m, nodata 255). A valid value outside the range is clipped into it.
        tags: texts for the file's metadata; keep wall-clock time out of them.
        overwrite: replace an existing file (at the end, atomically).
        overviews: "average", or "mode" for class codes, which have no mean.
        style: of QGIS (see `canopy.geo.style`), written beside the file as .qml.
        colours: `#rrggbb` of the codes of a single uint8 band, kept in the file.

    Attributes:
        sha256: of the finished file; None before.
        companions: set before the end, it is called with the finished file in its hidden folder and its
            sha256, and makes further files beside it, whose names it returns. They take their places
            beside `path` right after it; what it raises leaves `path` as it was.

    Raises InputError at once for an existing file, bad bands or encoding; OutputError for a folder that
    cannot be written, a disk without room, or a file that does not hold what was written.
    """

    def __init__(
        self,
        path: str | Path,
        grid: Grid,
        bands: Sequence[BandSpec],
        *,
        encoding: str = "float32",
        tags: Mapping[str, object] | None = None,
        overwrite: bool = False,
        overviews: str = "average",
        style: str = "",
        colours: Mapping[int, str] | None = None,
    ) -> None:
        beside = [Path(path).with_suffix(".qml")] if style else []
        self.path, *_ = check_output([path, *beside], overwrite=overwrite)
        self.grid, self.bands, self.encoding = grid, list(bands), encoding_named(encoding)
        self.sha256: str | None = None
        self.companions: Callable[[Path, str], Sequence[str]] | None = None
        if not self.bands:
            raise InputError("no bands to write", where=path)
        if overviews not in OVERVIEWS:
            raise InputError(f"overviews {overviews!r}", expected=" or ".join(OVERVIEWS))
        unfit = [band for band in self.bands if band.unit not in ("m", "1")]
        if self.encoding.dtype == "uint8" and unfit:
            raise InputError(
                f"band {unfit[0].name} ({unfit[0].unit}) does not fit encoding uint8m",
                expected="metres or classes",
                remedy="use --encoding uint16cm or float32",
            )
        self._overviews, self._style, self._colours = overviews, style, colours
        self._scales = [self.encoding.scale_of(b) for b in self.bands]
        self._tags = {k: str(v) for k, v in sorted((tags or {}).items())}
        self._check_space()
        # Of all stored numbers: a disk that fills up may lose blocks, which read back as nodata, in silence.
        self._sum = 0
        self._dataset: rasterio.io.DatasetWriter | None = None
        self._folder: Path | None = None
        try:
            with self._told("cannot be written"):
                self._folder = Path(
                    tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent)
                )
                self._open_scratch()
        except BaseException:  # Ctrl-C too: nobody else knows of the folder yet
            self._drop()
            raise

    # ---- before -------------------------------------------------------------------------------
    def _check_space(self) -> None:
        samples = self.grid.height * self.grid.width * len(self.bands)
        needed = int(samples * np.dtype(self.encoding.dtype).itemsize * SCRATCH_FACTOR) + SCRATCH_EXTRA
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise OutputError(
                f"{free / 1e9:.2f} GB free on the disk, {needed / 1e9:.2f} GB needed for "
                f"{self.grid.width} x {self.grid.height} px",
                where=self.path.parent,
                remedy="make room, choose another disk, or map a smaller area",
            )

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """GDAL's errors, and the system's, become one OutputError."""
        try:
            with raster_env():
                yield
        except CanopyError:
            raise
        except Exception as error:  # GDAL's own kinds of exceptions have no public name
            reason = " ".join(str(error.__cause__ or error).split())[:160]
            raise OutputError(f"{what} ({reason})", where=self.path) from error

    def _open_scratch(self) -> None:
        self._dataset = rasterio.open(
            self._scratch,
            "w",
            driver="GTiff",
            height=self.grid.height,
            width=self.grid.width,
            count=len(self.bands),
            dtype=self.encoding.dtype,
            crs=rasterio.crs.CRS.from_wkt(self.grid.crs.to_wkt()),
            transform=self.grid.transform,
            nodata=self.encoding.nodata,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            interleave="band",
            # Four uint8 bands are no RGBA picture.
            photometric="PALETTE" if self._colours else "MINISBLACK",
            ALPHA="UNSPECIFIED",
            sparse_ok=True,  # blocks never written read back as nodata
            bigtiff="IF_SAFER",
        )
        self._dataset.update_tags(AREA_OR_POINT="Area", **self._tags)
        for index, band in enumerate(self.bands, 1):
            self._dataset.set_band_description(index, band.name)
            self._dataset.set_band_unit(index, band.unit)
            self._dataset.update_tags(index, units=band.unit)
        self._dataset.scales = self._scales
        if self._colours:
            rgb = {code: tuple(bytes.fromhex(colour[1:])) for code, colour in self._colours.items()}
            self._dataset.write_colormap(1, rgb)

    # ---- during -------------------------------------------------------------------------------
    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int = 0, col_off: int = 0) -> None:
        """Store values (bands, h, w) where valid, nodata elsewhere, at (row_off, col_off).

        `valid` is (h, w), or (bands, h, w) for bands that are missing in different places.
        Windows lie inside the grid and do not overlap (it fails where they do). For one thread.
        """
        if self._dataset is None:
            raise OutputError("the writer is closed", where=self.path)
        values, valid = np.asarray(values), np.asarray(valid, dtype=bool)
        h, w = valid.shape[-2:]
        if not np.isfinite(values[np.broadcast_to(valid, values.shape)]).all():
            raise OutputError(
                f"valid pixels that are not finite near row {row_off}, column {col_off}", where=self.path
            )
        stored = self.encoding.encode(values, valid, self._scales)
        with self._told("cannot be written"):
            self._dataset.write(stored, window=Window(col_off, row_off, w, h))
        self._sum += self._sum_of(stored)

    # ---- after --------------------------------------------------------------------------------
    def close(self) -> None:
        """Make the COG, verify it, move it into place. Does nothing when already closed."""
        if self._dataset is None or self._folder is None:
            return
        result = self._folder / self.path.name
        try:
            with self._told("cannot be finished"):
                self._dataset.close()
                self._dataset = None
                self._make_cog(result)
                self._verify(result)
            with told_as_output(self.path, "cannot be finished"):
                self._scratch.unlink()
                flush(result)
                self.sha256 = file_sha256(result)
                names = [*self.companions(result, self.sha256)] if self.companions else []
                if self._style:
                    names.append(result.with_suffix(".qml").name)
                    (self._folder / names[-1]).write_text(self._style, encoding="utf-8")
                for name in (result.name, *names):
                    os.replace(self._folder / name, self.path.with_name(name))
        finally:
            self._drop()

    def _drop(self) -> None:
        """Remove everything that was written; `path` stays as it was."""
        if self._dataset is not None:
            with contextlib.suppress(RasterioError, OSError):
                self._dataset.close()
            self._dataset = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def _scratch(self) -> Path:
        assert self._folder is not None  # only asked for between construction and close
        return self._folder / f"{self.path.name}.pixels"

    def _make_cog(self, result: Path) -> None:
        rasterio.shutil.copy(
            self._scratch,
            result,
            driver="COG",
            BLOCKSIZE=BLOCK,
            COMPRESS="DEFLATE",
            LEVEL=str(LEVEL),
            PREDICTOR="YES",
            RESAMPLING=self._overviews,
            BIGTIFF="IF_SAFER",
            NUM_THREADS="2",  # fixed: results and memory do not depend on the machine
            STATISTICS="YES",
        )

    def _verify(self, result: Path) -> None:
        """Read the file and its overviews to the end; it must hold what was written, at its place."""
        total = 0
        with rasterio.open(result, driver="GTiff") as made:
            if made.shape != self.grid.shape or made.count != len(self.bands) or not made.crs:
                raise OutputError("the finished file has another shape, or no CRS", where=self.path)
            for _, window in made.block_windows(1):
                total += self._sum_of(made.read(window=window))
            levels = len(made.overviews(1))
        if (total - self._sum) % 2**64:
            raise OutputError(
                "reads back differently from what was written",
                where=self.path,
                remedy="nothing was kept; check the disk and run again",
            )
        for level in range(levels):
            with rasterio.open(result, driver="GTiff", overview_level=level) as overview:
                for _, window in overview.block_windows(1):
                    overview.read(window=window)

    def _sum_of(self, stored: np.ndarray) -> int:
        """Sum of stored numbers as whole numbers, counted from nodata: pixels never written add nothing."""
        whole = np.dtype(f"u{stored.itemsize}")
        nodata = int(np.array(self.encoding.nodata, dtype=stored.dtype).view(whole))
        return int(stored.view(whole).sum(dtype=np.uint64)) - nodata * stored.size

    def __enter__(self) -> CogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()
