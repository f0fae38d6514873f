"""What a prediction is asked for: the one declaration for the command line, Python and regional runs.

A field's name, type, default and help text stand here and nowhere else. The command line makes its options of
them (`canopy.cli.options.takes_groups`), Python's keywords are checked against them, and the settings of a
region extend them. Only plain values: loaded models, areas and arrays are handed over beside them. Nothing
heavy is imported, so that reading options costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import field_validator

from canopy.config import Settings, check_known, option, validate_settings

if TYPE_CHECKING:
    from canopy.geo.area import AOI

# 4e9 px are 1000 km2 at 0.5 m and 16 GB of float32: a day of CPU work. More is a job for `canopy map`.
MAX_PIXELS = 4_000_000_000

HELP_BACKEND = "auto, torch or openvino. auto: openvino on a CPU where it is installed, else torch."
HELP_PRECISION = "auto (fp32), fp32, bf16 where the hardware has it, or int8 (see canopy models quantize)."
_HELP_CRS = (
    "CRS of the map; `image` for the image's own grid; `quadkey` for Web-Mercator pixels that quadkeys "
    "divide into. Default: the area's UTM zone."
)
_HELP_RADIOMETRY = (
    "Move the image's colours onto those of the model's training imagery: none; match; v1-aerial (onto what "
    "v1's own network says they are); or the target's own "
    "r5,r95,g5,g95,b5,b95 in 0..1. The image's percentiles are measured once over all of it."
)
_HELP_IMAGERY = (
    "A named source (naip, demo, ...), a STAC API or catalog, a tile or WMS template, a directory or VRT."
)
_HELP_OUT = "GeoTIFF to write; OUT.json (a STAC item) lies beside it. Default: IMAGE_chm.tif here."


class AreaOptions(Settings):
    """Which area: `bbox`, `bounds` or `aoi`; none of them says nothing."""

    bbox: str | tuple[float, ...] | None = option(
        None, "Latitude first: a point (see --size-m) or two opposite corners.",
        metavar="LAT,LON[,LAT,LON]", panel="Area",
    )  # fmt: skip
    size_m: float | None = option(
        None, "Side of the square around --bbox LAT,LON, metres; 1000 if not given.", panel="Area"
    )
    bounds: str | tuple[float, ...] | None = option(
        None, "West, south, east, north.", metavar="W,S,E,N", panel="Area"
    )
    bounds_crs: str = option("EPSG:4326", "CRS of --bounds.", panel="Area")
    aoi: str | None = option(
        None, "Polygons of any vector file; outside is nodata.", metavar="FILE", panel="Area"
    )
    layer: str | None = option(None, "Of an --aoi that has several layers.", metavar="NAME", panel="Area")

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> Self:
        """Options as a caller named them.

        Raises:
            InputError: an unknown name; the nearest known one is told. ConfigError: a value of another type.
        """
        for name in given:
            check_known(name, list(cls.model_fields), f"option of {where}")
        return validate_settings(cls, given, where)

    def area(self) -> AOI | None:
        """The area that was asked for; None if none was. Raises AreaError."""
        from canopy.geo.area import choose_area

        return choose_area(
            bbox=self.bbox, size_m=self.size_m, bounds=self.bounds, bounds_crs=self.bounds_crs,
            aoi=self.aoi, layer=self.layer,
        )  # fmt: skip

    @property
    def inputs(self) -> list[str]:
        """The files that the area is read from."""
        return [self.aoi] if self.aoi else []


class PredictOptions(AreaOptions):
    """What to map, from which imagery, with which model and how: alike for one map and for a region's tiles.

    Without an area it is all of the imagery. Values of `crs`: a CRS, `image` or `quadkey`; it also stands in
    for the CRS of images that carry none, unless `input_crs` is given.
    """

    images: tuple[str, ...] = option(
        (), "RGB images; several are mosaicked.", metavar="[IMAGE]...", argument=True
    )
    imagery: str | None = option(None, _HELP_IMAGERY, metavar="NAME")
    datetime: str | None = option(None, "Acquisitions to use, as STAC has it.", metavar="FROM/TO")
    input_crs: str | None = option(
        None, "CRS of the images, in place of what they say. Default where they say none: --crs."
    )
    bands: str | tuple[int, ...] | None = option(
        None, "Band numbers of red, green, blue, from 1.", metavar="R,G,B"
    )
    nodata: float | None = option(None, "Image value that means missing where all bands have it.")
    scale: float | None = option(None, "Image value that means white; needed unless uint8.")
    on_damaged: Literal["fail", "skip"] = option(
        "fail", "Where one of several images cannot be read: stop, or leave it out with a note.",
        metavar="fail|skip",
    )  # fmt: skip

    model: str = option("default", "See canopy models list.", metavar="NAME|FILE")
    gsd: float | None = option(None, "Ground metres per pixel of the map. Default: the model's.")
    crs: str | None = option(None, _HELP_CRS)
    encoding: str = option("float32", "float32, uint16cm or uint8m.")
    date_band: bool = option(False, "Add band acquisition_date: days since 1970-01-01, 0 unknown.")
    interval: float | None = option(
        None, "Add bands height_lower, height_upper of this coverage.", metavar="0.9"
    )
    quality_band: bool = option(False, "Add band quality: bit flags, see docs/uncertainty.md.")
    radiometry: str = option("none", _HELP_RADIOMETRY, metavar="none|match|v1-aerial|PERCENTILES")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    backend: str = option("auto", HELP_BACKEND)
    precision: str = option("auto", HELP_PRECISION)
    batch_size: int | str = option("auto", "Crops per forward pass, or auto.")

    @field_validator("imagery", "aoi", "model", "out", mode="before", check_fields=False)
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("crs", "input_crs", "bounds_crs", mode="before")
    @classmethod
    def _crs(cls, value: object) -> object:
        """EPSG numbers and CRS objects, which Python has, as text."""
        if isinstance(value, int):
            return f"EPSG:{value}"
        return value.to_wkt() if hasattr(value, "to_wkt") else value


class OneMapOptions(PredictOptions):
    """What only a single map is asked for; without `out` it is kept in memory."""

    out: str | None = option(None, _HELP_OUT, metavar="OUT.tif", flags=("-o", "--out"))
    workers: int | str = option("auto", "Threads that read imagery ahead, or auto.")
    quicklook: bool = option(False, "Draw OUT.png beside the map.")
    max_pixels: int = option(MAX_PIXELS, "Refuse maps larger than this.", shown="4e9")
    overwrite: bool = option(False, "Replace outputs that exist.")
