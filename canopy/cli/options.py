"""The options that say which area, the same for every command that has one.

Options and output that every command shares.

Options in groups: a command takes a dataclass, a user types its fields as options.

Commands that map something share most of what they can be asked; each option is declared once, as a field.

The options of `canopy evaluate`, one name each: what a user types, and what --help says of it.

The options that only `canopy map` has: what a user types, and what --help says of it.

Arguments that `canopy train` and `canopy pretrain` share, and what they do around a run.
"""

from __future__ import annotations

import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from canopy.errors import refuse_options
from canopy.inference.options import HELP_BACKEND, HELP_PRECISION
from canopy.runtime import setup_logging

if TYPE_CHECKING:
    from pydantic import BaseModel

    from canopy.geo.area import AOI


_PANEL = "Area"

Bbox = Annotated[
    str | None,
    typer.Option(
        "--bbox",
        metavar="LAT,LON[,LAT,LON]",
        help="Latitude first: a point (see --size-m) or two opposite corners.",
        rich_help_panel=_PANEL,
    ),
]
SizeM = Annotated[
    float | None,
    typer.Option(
        "--size-m",
        help="Side of the square around --bbox LAT,LON, metres; 1000 if not given.",
        rich_help_panel=_PANEL,
    ),
]
Bounds = Annotated[
    str | None,
    typer.Option("--bounds", metavar="W,S,E,N", help="West, south, east, north.", rich_help_panel=_PANEL),
]
BoundsCrs = Annotated[str, typer.Option("--bounds-crs", help="CRS of --bounds.", rich_help_panel=_PANEL)]
Aoi = Annotated[
    str | None,
    typer.Option(
        "--aoi",
        metavar="FILE",
        help="Polygons of any vector file; outside is nodata.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class AreaOptions:
    """Which area; see `canopy.cli.options`."""

    bbox: Bbox = None
    size_m: SizeM = None
    bounds: Bounds = None
    bounds_crs: BoundsCrs = "EPSG:4326"
    aoi: Aoi = None

    @property
    def inputs(self) -> list[str]:
        """The files that the area is read from."""
        return [self.aoi] if self.aoi else []

    def choose(self) -> AOI | None:
        """The area that was asked for; None if none was. Raises AreaError."""
        from canopy.geo.area import choose_area

        return choose_area(**asdict(self))


Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say only what went wrong.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks of unexpected faults.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether the user gave a parameter of the command, be it its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_given(context: typer.Context, *names: str, where: str, because: str) -> None:
    """Refuse those parameters of a command that were typed and have no part in what it will do.

    Args:
        context: of the running command.
        names: of its parameters, as Python has them.
        where: the option that leaves them without use.
        because: why, in a few words.
    """
    typed = {
        _as_typed(parameter, context.params[name]): True
        for parameter in context.command.params
        if (name := parameter.name) in names and was_typed(context, name)
    }
    refuse_options(typed, where=where, because=because)


def _as_typed(parameter: Any, value: object) -> str:
    """`--shift`, or `--no-shift` where that was said."""
    return str((parameter.secondary_opts if value is False else parameter.opts)[-1])


def print_json(result: Mapping[str, Any]) -> None:
    """Print the one machine-readable object of `--json` on stdout."""
    typer.echo(json.dumps(result, indent=2, allow_nan=False, default=str))


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Spread those parameters of a typer command that are groups of options into one option per field.

    A group is a dataclass whose fields' types are `Annotated[..., typer.Option(...)]`, each with a default,
    or a pydantic model as `canopy.inference.options` has them; the command gets it, filled. Its other
    parameters stay as they are. Meant as a decorator.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, list[inspect.Parameter]] = {}
    spread: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and (is_dataclass(kind) or hasattr(kind, "model_fields")):
            groups[parameter.name] = _of_dataclass(kind) if is_dataclass(kind) else _of_model(kind)
            spread += groups[parameter.name]
        else:
            spread.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        filled = {}
        for name, parameters in groups.items():
            values = {parameter.name: given.pop(parameter.name) for parameter in parameters}
            kind: Any = hints[name]
            checked = hasattr(kind, "model_fields")
            filled[name] = kind.of(_said(values), "the command") if checked else kind(**values)
        command(**given, **filled)

    run.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    return run


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was left out: an argument that may be repeated is None then."""
    return {name: value for name, value in values.items() if value is not None}


def _of_dataclass(kind: Any) -> list[inspect.Parameter]:
    types = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        if field.default is MISSING:
            raise TypeError(f"{kind.__name__}.{field.name} needs a default")
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
        for f in fields(kind)
    ]


def _of_model(kind: Any) -> list[inspect.Parameter]:
    parameters = []
    for name, field in kind.model_fields.items():
        typed = field.json_schema_extra or {}
        if typed.get("argument"):
            info: Any = typer.Argument(metavar=typed["metavar"], help=field.description)
        else:
            info = typer.Option(
                *typed.get("flags", ("--" + name.replace("_", "-"),)),
                metavar=typed.get("metavar"), help=field.description,
                rich_help_panel=typed.get("panel"), show_default=typed.get("shown", True),
            )  # fmt: skip
        many = typed.get("argument", False)
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None if many else field.default,
                annotation=Annotated[list[str] | None if many else _typed_as(field.annotation), info],
            )
        )  # fmt: skip
    return parameters


def _typed_as(annotation: Any) -> Any:
    """What a user types for a field of several types: text where it may be text."""
    choices = get_args(annotation) or (annotation,)
    if all(isinstance(one, str) for one in choices):  # Literal: pydantic says what is expected
        return str
    kind = str if str in choices else choices[0]
    return kind | None if type(None) in choices else kind


DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and say what would be done; stop there.")]


_HELP_MAP = "Height GeoTIFF, folder of tiles, or a published v1 or v2 map."
_HELP_REFERENCE = "Height raster (may be repeated), table of GEDI shots, or field plots."
_HELP_BY = (
    "site, height, cover, slope, a column, NAME=classes.tif, NAME=zones.gpkg:COLUMN; several with commas."
)
_HELP_STAT = "What a pixel, footprint or plot takes. Default: mean; for GEDI the column's percentile."
_HELP_FLOOR = "Heights below this count as 0 on both sides (NEON's height models: 2, or 0.667 m)."
_HELP_BENCHMARK = "Named benchmark: neon-test, sao-paulo, california, france, open-canopy, pack."
_HELP_DATA = "Folder of the benchmark's files; `canopy data get` fills it."
_SCORING = "Benchmarks"
_HELP_BLOCK = "Side of the blocks resampled for intervals, m. Default: up to 250 m, so that 25 are left."

Map = Annotated[str | None, typer.Argument(metavar="MAP.tif", help=_HELP_MAP)]
Reference = Annotated[list[str] | None, typer.Option("--reference", help=_HELP_REFERENCE)]
Kind = Annotated[
    str | None, typer.Option("--kind", metavar="chm|gedi|plots", help="Default: told from the file.")
]
By = Annotated[list[str] | None, typer.Option("--by", metavar="WAY,WAY", help=_HELP_BY)]
EvaluateOut = Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")]
Stat = Annotated[str | None, typer.Option("--stat", metavar="mean|max|p95", help=_HELP_STAT)]
FloorM = Annotated[float | None, typer.Option("--floor-m", help=_HELP_FLOOR)]
Sensor = Annotated[
    str | None, typer.Option("--sensor", help="The floor by NEON's lidar: gemini, riegl or galaxy.")
]
Column = Annotated[str | None, typer.Option("--column", help="Heights of a table, e.g. rh_98.")]
RadiusM = Annotated[
    float | None, typer.Option("--radius-m", help="Of plots that are points. Default 10; GEDI 12.5.")
]
Slope = Annotated[Path | None, typer.Option("--slope", help="Raster of slope in degrees.")]
Dem = Annotated[Path | None, typer.Option("--dem", help="Elevation raster, for slope.")]
Shift = Annotated[bool, typer.Option("--shift/--no-shift", help="Measure the shift.")]
BlockM = Annotated[float | None, typer.Option("--block-m", help=_HELP_BLOCK)]
Replicates = Annotated[int, typer.Option("--replicates", help="Of the bootstrap; 0: no intervals.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the bootstrap.")]
EvaluateNodata = Annotated[float | None, typer.Option("--nodata", help="Missing in the map.")]
ReferenceNodata = Annotated[
    float | None, typer.Option("--reference-nodata", help="Missing in the reference.")
]
Band = Annotated[
    str | None, typer.Option("--band", metavar="N|NAME", help="The map's height band, if it has several.")
]
ReferenceBand = Annotated[
    str | None, typer.Option("--reference-band", metavar="N|NAME", help="The reference's, likewise.")
]
Layer = Annotated[str | None, typer.Option("--layer", help="Of a vector file with several (plots).")]
MapDate = Annotated[str | None, typer.Option("--map-date", help="2021, 2021-07 or 2021-07-04.")]
ReferenceDate = Annotated[str | None, typer.Option("--reference-date", help="Likewise.")]
Benchmark = Annotated[
    str | None, typer.Option("--benchmark", metavar="NAME", help=_HELP_BENCHMARK, rich_help_panel=_SCORING)
]
EvaluateModel = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="Name or file; may be repeated. Default: default.", rich_help_panel=_SCORING
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help=_HELP_DATA, rich_help_panel=_SCORING)
]
Group = Annotated[
    list[str] | None,
    typer.Option("--group", help="Only this group of the benchmark; repeat.", rich_help_panel=_SCORING),
]
EvaluateDevice = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or mps.", rich_help_panel=_SCORING)
]
EvaluateBackend = Annotated[str, typer.Option("--backend", help=HELP_BACKEND, rich_help_panel=_SCORING)]
EvaluatePrecision = Annotated[str, typer.Option("--precision", help=HELP_PRECISION, rich_help_panel=_SCORING)]


Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What differs from the defaults.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override: steps=500 data.chips=DIR.")
]
RunDir = Annotated[Path, typer.Option("-o", "--out", metavar="RUN_DIR", help="Folder of the run.")]
RunResume = Annotated[
    bool, typer.Option("--resume", help="Go on from RUN_DIR/last.ckpt, exactly where it was.")
]
FastDevRun = Annotated[
    bool,
    typer.Option(
        "--fast-dev-run", help="Two steps, all that follows them, in a temporary folder, as a check."
    ),
]
S = TypeVar("S", bound="BaseModel")


def settings_of(schema: type[S], config: Path, overrides: list[str] | None, quiet: bool, verbose: bool) -> S:
    """Start logging and read the config; see `load_settings`."""
    from canopy.config import load_settings

    setup_logging(quiet, verbose)
    return load_settings(schema, config, overrides or [])


def command() -> str:
    """How this process was started, for a card."""
    return shlex.join(["canopy", *sys.argv[1:]])
