"""The options of a prediction: what a user types, and what --help says of it.

`PredictionOptions` are those that `canopy predict` and `canopy map` share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

_HELP_OUT = "GeoTIFF to write; OUT.json (a STAC item) lies beside it. Default: IMAGE_chm.tif here."
_HELP_CRS = (
    "CRS of the map; `image` for the image's own grid; `quadkey` for Web-Mercator pixels that quadkeys "
    "divide into. Default: the area's UTM zone."
)
_HELP_RADIOMETRY = (
    "Move the image's colours onto those of the model's training imagery: none; match; or the target's own "
    "r5,r95,g5,g95,b5,b95 in 0..1. The image's percentiles are measured once over all of it."
)
_HELP_IMAGERY = (
    "A named source (naip, demo, ...), a STAC API or catalog, an XYZ template, a directory or VRT."
)
HELP_BACKEND = (
    "auto, torch, torch-compiled (minutes to start; for long jobs), openvino or onnx. "
    "auto: openvino on a CPU where it is installed, else torch."
)
HELP_PRECISION = "auto (fp32), fp32, bf16 where the hardware has it, or int8 (see canopy models quantize)."

Images = Annotated[
    list[str] | None, typer.Argument(metavar="[IMAGE]...", help="RGB images; several are mosaicked.")
]
Imagery = Annotated[str | None, typer.Option("--imagery", metavar="NAME", help=_HELP_IMAGERY)]
Model = Annotated[str, typer.Option("--model", metavar="NAME|FILE", help="See canopy models list.")]
Out = Annotated[str | None, typer.Option("-o", "--out", metavar="OUT.tif", help=_HELP_OUT)]
Gsd = Annotated[
    float | None, typer.Option("--gsd", help="Ground metres per pixel of the map. Default: the model's.")
]
Crs = Annotated[str | None, typer.Option("--crs", help=_HELP_CRS)]
InputCrs = Annotated[
    str | None, typer.Option("--input-crs", help="CRS of images that carry none. Default: --crs.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Backend = Annotated[str, typer.Option("--backend", help=HELP_BACKEND)]
Precision = Annotated[str, typer.Option("--precision", help=HELP_PRECISION)]
BatchSize = Annotated[str, typer.Option("--batch-size", help="Crops per forward pass, or auto.")]
Workers = Annotated[str, typer.Option("--workers", help="Threads that read imagery ahead, or auto.")]
Datetime = Annotated[
    str | None, typer.Option("--datetime", metavar="FROM/TO", help="Acquisitions to use, as STAC has it.")
]
Bands = Annotated[
    str | None, typer.Option("--bands", metavar="R,G,B", help="Band numbers of red, green, blue, from 1.")
]
Nodata = Annotated[
    float | None, typer.Option("--nodata", help="Image value that means missing where all bands have it.")
]
Scale = Annotated[
    float | None, typer.Option("--scale", help="Image value that means white; needed unless uint8.")
]
Encoding = Annotated[str, typer.Option("--encoding", help="float32, uint16cm or uint8m.")]
DateBand = Annotated[
    bool, typer.Option("--date-band", help="Add band acquisition_date: days since 1970-01-01, 0 unknown.")
]
Interval = Annotated[
    float | None,
    typer.Option("--interval", metavar="0.9", help="Add bands height_lower, height_upper of this coverage."),
]
QualityBand = Annotated[
    bool, typer.Option("--quality-band", help="Add band quality: bit flags, see docs/uncertainty.md.")
]
Quicklook = Annotated[bool, typer.Option("--quicklook", help="Draw OUT.png beside the map.")]
Radiometry = Annotated[
    str, typer.Option("--radiometry", metavar="none|match|PERCENTILES", help=_HELP_RADIOMETRY)
]
MaxPixels = Annotated[
    int | None, typer.Option("--max-pixels", help="Refuse maps larger than this.", show_default="4e9")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and say what would be done; stop there.")]


@dataclass(frozen=True)
class PredictionOptions:
    """What to map from which imagery, with which model and how: alike for one map and for a region's tiles.

    Names and defaults are those of `canopy.inference.request.Request` and of
    `canopy.inference.region.settings.RegionSettings`; see `canopy.cli.groups`.
    """

    images: Images = None
    imagery: Imagery = None
    datetime: Datetime = None
    input_crs: InputCrs = None
    bands: Bands = None
    nodata: Nodata = None
    scale: Scale = None
    model: Model = "default"
    gsd: Gsd = None
    encoding: Encoding = "float32"
    date_band: DateBand = False
    interval: Interval = None
    quality_band: QualityBand = False
    radiometry: Radiometry = "none"
    device: Device = "auto"
    backend: Backend = "auto"
    precision: Precision = "auto"
    batch_size: BatchSize = "auto"
