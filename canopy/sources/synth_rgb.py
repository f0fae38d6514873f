"""Write a three-band uint8 picture window by window: a verified Cloud-Optimized GeoTIFF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from canopy.errors import OutputError
from canopy.geo.checksum import BLOCK, BlockChecksums
from canopy.geo.grid import Grid
from canopy.geo.opening import raster_env


class RgbWriter:
    """Pixels in windows of any order and size, then `close()`; memory does not depend on the picture's size.

    `CogWriter` writes heights, where one stored number means "none"; a picture has no such number. The caller
    gives a name in a scratch folder, moves the finished file into place, and removes the folder on failure.

    Args:
        path: the file to make; `path` + ".scratch" is used beside it.
        grid: its place.
        tags: texts for the file's metadata.
    """

    def __init__(self, path: Path, grid: Grid, tags: Mapping[str, str]) -> None:
        self.path, self._scratch = path, path.with_name(path.name + ".scratch")
        self._sums = BlockChecksums(3, grid.height, grid.width, "uint8", 0)
        with raster_env():
            self._dataset = rasterio.open(
                self._scratch,
                "w",
                driver="GTiff",
                dtype="uint8",
                count=3,
                height=grid.height,
                width=grid.width,
                crs=rasterio.crs.CRS.from_wkt(grid.crs.to_wkt()),
                transform=grid.transform,
                tiled=True,
                blockxsize=BLOCK,
                blockysize=BLOCK,
                interleave="pixel",
                photometric="RGB",
                bigtiff="IF_SAFER",
            )
            self._dataset.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
            self._dataset.update_tags(AREA_OR_POINT="Area", **dict(sorted(tags.items())))
            for index, name in enumerate(("red", "green", "blue"), 1):
                self._dataset.set_band_description(index, name)

    def write(self, rgb: np.ndarray, row_off: int, col_off: int) -> None:
        """Store uint8 (3, h, w) with its upper-left pixel at (row_off, col_off). Raises OutputError."""
        self._sums.add(rgb, row_off, col_off)
        try:
            with raster_env():
                self._dataset.write(rgb, window=Window(col_off, row_off, rgb.shape[2], rgb.shape[1]))
        except (RasterioError, OSError) as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Make the COG, read every block back, drop the scratch file. Raises OutputError."""
        try:
            with raster_env():
                self._dataset.close()
                rasterio.shutil.copy(
                    self._scratch,
                    self.path,
                    driver="COG",
                    BLOCKSIZE=BLOCK,
                    COMPRESS="DEFLATE",
                    PREDICTOR="YES",
                    OVERVIEWS="AUTO",
                    OVERVIEW_RESAMPLING="AVERAGE",
                    BIGTIFF="IF_SAFER",
                    NUM_THREADS="2",
                    STATISTICS="NO",
                )
                self._verify()
            self._scratch.unlink()
        except (RasterioError, OSError) as error:
            if isinstance(error, OutputError):
                raise
            raise self._failure(error) from error

    def abort(self) -> None:
        """Let go of the scratch file."""
        self._dataset.close()

    def _verify(self) -> None:
        with rasterio.open(self.path, driver="GTiff") as made:
            for _, window in made.block_windows(1):
                got = made.read(window=window)
                i, j = int(window.row_off) // BLOCK, int(window.col_off) // BLOCK
                sums = self._sums.sums_of(got, np.s_[: got.shape[1], : got.shape[2]])
                if not np.array_equal(sums, self._sums.sums[:, i, j]):
                    raise OutputError(
                        f"block ({i}, {j}) read back differently from what was written", where=self.path.name
                    )

    def _failure(self, error: BaseException) -> OutputError:
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        return OutputError(f"the picture cannot be written ({reason})", where=self.path.name)
