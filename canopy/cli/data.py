"""`canopy data list | describe | get | verify`: what data there are, and how to have them.

`canopy data chips`: parse, call, print.

`canopy data chm`: parse, call, print.

`canopy data gedi`: parse, call, print.

`canopy data`: make, fetch and prepare data. Here: synthetic scenes with exact truth.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canopy.chips.options import CutOptions, SplitOptions
from canopy.cli.options import (
    Json,
    Overwrite,
    Quiet,
    Verbose,
    print_json,
    refuse_given,
    takes_groups,
)
from canopy.errors import InputError
from canopy.files import check_output
from canopy.inference.options import AreaOptions
from canopy.runtime import Progress, log, progress_bar, setup_logging

if TYPE_CHECKING:
    from canopy.labels.fetch import Plan
    from canopy.labels.gedi import Granule, ShotsReport


_SHOWN = 20


def list_data(json_: Json = False) -> None:
    """Imagery sources (for `predict --imagery` and training), label sources, and models.

    Example: canopy data list
    """
    from canopy.imagery.named import all_sources
    from canopy.labels.catalog import known_labels, label_source
    from canopy.models.registry import published_models

    imagery = {
        m.name: {"title": m.title, "gsd_m": m.gsd_m, "licence": m.licence, "dates": m.dates}
        for m in all_sources()
    }
    labels: dict[str, dict[str, Any]] = {}
    for name in known_labels():
        m = label_source(name)
        labels[name] = {
            "title": m.title,
            "products": list(m.products),
            "licence": m.licence,
            "dates": m.dates,
        }
    models = {name: {"title": m.title, "licence": m.licence} for name, m in published_models().items()}
    if json_:
        print_json({"imagery": imagery, "labels": labels, "models": models})
        return
    for heading, rows in (("imagery", imagery), ("labels", labels), ("models", models)):
        typer.echo(f"{heading}:")
        for name, row in rows.items():
            typer.echo(f"  {name:29} {row['title']}; {row['licence']}")


def describe(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A source, a NEON site, or a tile's file name.")
    ],
    json_: Json = False,
) -> None:
    """All that is known of a source: products, place, dates, licence, how to cite, what to watch.

    A NEON site code (HARV) and a tile's file name are described too.

    Example: canopy data describe neon
    """
    facts = _facts(name)
    if json_:
        print_json(facts)
        return
    for key, value in facts.items():
        if value not in (None, "", [], (), {}):
            _show(key, value)


def _facts(name: str) -> dict[str, Any]:
    from canopy.config import manifest_names
    from canopy.errors import InputError
    from canopy.imagery.named import named_source
    from canopy.labels.catalog import known_labels, label_source
    from canopy.labels.names import aop_crs, neon_site, neon_sites, read_name

    if name in known_labels():
        return {"labels": name, **label_source(name).model_dump(mode="json", exclude={"name"})}
    if name in manifest_names("imagery"):
        return {"imagery": name, **named_source(name).model_dump(mode="json", exclude={"name"})}
    if name.upper() in neon_sites():
        site = neon_site(name)
        crs = None if site.site == site.flight_site and site.utm_zone is None else aop_crs(site.site)
        return {**site.model_dump(mode="json"), "flight_site": site.flight_site, "flight_crs": crs}
    tile = read_name(name)
    if tile is not None:
        bounds, raster = list(tile.bounds), list(tile.raster_bounds)
        return {"file": tile.filename, "bounds": bounds, "raster_bounds": raster, "crs": tile.crs}
    known = ", ".join([*known_labels(), *manifest_names("imagery")])
    raise InputError("no such source, NEON site or tile name", where=name, expected=f"one of {known}")


def _show(key: str, value: Any, indent: int = 0) -> None:
    """A fact as indented lines."""
    space = "  " * indent
    if isinstance(value, dict):
        typer.echo(f"{space}{key}:")
        for inner, part in value.items():
            if part not in (None, "", [], {}):
                _show(inner, part, indent + 1)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            typer.echo(
                f"{space}{key}: " + ", ".join(f"{k} {v}" for k, v in part.items() if v not in (None, "", []))
            )
    elif isinstance(value, list):
        typer.echo(f"{space}{key}: {', '.join(str(part) for part in value)}")
    else:
        typer.echo(f"{space}{key}: {' '.join(str(value).split())}")


@takes_groups
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A label source; see `canopy data list`.")],
    out_dir: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the files.")],
    place: AreaOptions,
    product: Annotated[
        str | None, typer.Option("--product", help="Kind of file; default: the source's.")
    ] = None,
    datetime: Annotated[
        str | None, typer.Option("--datetime", help="Such as 2019, 2019-07 or 2018/2021.")
    ] = None,
    site: Annotated[list[str] | None, typer.Option("--site", help="NEON site code; may be repeated.")] = None,
    match: Annotated[str | None, typer.Option("--match", help="Regular expression for file names.")] = None,
    max_gb: Annotated[float, typer.Option("--max-gb", min=0, help="Ask for --yes above this.")] = 5.0,
    yes: Annotated[bool, typer.Option("--yes", help="Fetch however much it is.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and sizes, fetch nothing.")
    ] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Download lidar or GEDI for an area: listed with sizes first, resumed, verified, never twice.

    Secrets come from the environment: NEON_API_TOKEN, EARTHDATA_TOKEN (or a netrc file).

    Example: canopy data get neon --site HARV --bbox 42.54,-72.17 --size-m 2000 -o harv --dry-run
    """
    from canopy.labels.catalog import Wish
    from canopy.labels.fetch import get_files, plan_get
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    area = place.area()
    wish = Wish(area=area, datetime=datetime, sites=tuple(site or ()), match=match)
    if area is not None and not (quiet or json_):
        typer.echo(area.describe(), err=True)
    plan = plan_get(name, wish, product=product)
    if not (quiet or json_):
        _print_plan(plan)
    if not dry_run:
        _refuse_too_much(plan, max_gb, yes)
        with progress_bar(quiet or json_) as progress:
            got = get_files(plan, out_dir, overwrite=overwrite, progress=progress)
        done = {"fetched": list(got.fetched), "kept": list(got.kept), "folder": str(out_dir)}
    if json_:
        print_json(plan.facts() | ({} if dry_run else done))
    elif not quiet and not dry_run:
        typer.echo(
            f"{out_dir}: {len(got.fetched)} fetched, {len(got.kept)} kept; cite: {plan.manifest.citation}"
        )


def _print_plan(plan: Plan) -> None:
    for file in plan.files[:_SHOWN]:
        typer.echo(
            f"{_size(file.bytes, file.about):>10}  {file.path}" + (f"  {file.day}" if file.day else "")
        )
    if len(plan.files) > _SHOWN:
        typer.echo(f"{'':10}  and {len(plan.files) - _SHOWN} more")
    about = any(file.about for file in plan.files)
    unknown = f", {plan.unknown} of unknown size" if plan.unknown else ""
    terms = f"{plan.manifest.licence}; {plan.manifest.attribution}"
    typer.echo(f"{len(plan.files)} files, {_size(plan.total_bytes, about)}{unknown}; {terms}")
    for note in plan.notes:
        typer.echo(note, err=True)


def _size(count: int | None, about: bool) -> str:
    if count is None:
        return "?"
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{'~' if about else ''}{amount:.3g} {unit}"
        amount /= 1000
    return f"{'~' if about else ''}{amount:.1f} GB"


def _refuse_too_much(plan: Plan, max_gb: float, yes: bool) -> None:
    from canopy.errors import InputError

    if plan.total_bytes > max_gb * 1e9 and not yes:
        raise InputError(
            f"{len(plan.files)} files of {plan.total_bytes / 1e9:.1f} GB",
            expected=f"at most {max_gb:g} GB",
            remedy="ask for a smaller area, or add --yes",
        )


def verify(
    name: Annotated[str, typer.Argument(metavar="NAME|DIR", help="A source, or a folder that `get` filled.")],
    json_: Json = False,
) -> None:
    """Check a source's manifest against its schema, or the files of a folder against their checksums.

    `all` checks every manifest.

    Example: canopy data verify harv
    """
    from canopy.errors import DataError
    from canopy.labels.fetch import verify_folder

    if Path(name).is_dir():
        found = verify_folder(name)
        if found["problems"]:
            first, what = next(iter(found["problems"].items()))
            if json_:
                print_json(found)
            raise DataError(
                f"{len(found['problems'])} of {found['files']} files have changed, such as {first}: {what}",
                where=name,
                remedy="fetch them again: `canopy data get` with --overwrite",
            )
    else:
        found = {"manifests": _verified(name)}
    if json_:
        print_json(found)
    elif "files" in found:
        typer.echo(f"{name}: {found['files']} files are as they were fetched")
    else:
        typer.echo(f"valid: {', '.join(found['manifests'])}")


def _verified(name: str) -> list[str]:
    """Names of the manifests that were read and found valid."""
    from canopy.config import manifest_names
    from canopy.errors import InputError
    from canopy.imagery.named import named_source
    from canopy.labels.catalog import known_labels, label_source
    from canopy.labels.names import neon_sites

    labels, imagery = known_labels(), manifest_names("imagery")
    wanted = [*labels, *imagery] if name == "all" else [name]
    for one in wanted:
        if one not in labels and one not in imagery:
            raise InputError(
                "no such folder or source",
                where=one,
                expected="a folder, all, or one of " + ", ".join([*labels, *imagery]),
            )
        manifest = label_source(one) if one in labels else named_source(one)
        for partner in getattr(manifest, "partners", ()):
            if partner.imagery is not None:
                named_source(partner.imagery)
        if getattr(manifest, "protocol", "") == "neon" or getattr(manifest, "sites", ()):
            sites = neon_sites()
            unknown = [code for code in getattr(manifest, "sites", ()) if code not in sites]
            if unknown:
                raise InputError(f"unknown NEON sites {', '.join(unknown)}", where=one)
    return wanted


_OF_PAIRS = {*CutOptions.model_fields, *SplitOptions.model_fields, "limit", "workers"} - {"size_px", "seed"}
_OF_CHIPS = ("index.csv", "index.parquet", "summary.json", "contact_sheet.png")
_FIRST_SEED = 1000  # far from 0, the demo's


@takes_groups
def chips(
    *,
    context: typer.Context,
    out_dir: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the chips.")],
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", metavar="FILE", help="CSV or Parquet table of pairs, see below."),
    ] = None,
    synth: Annotated[
        int | None,
        typer.Option("--synth", metavar="N", help="Instead: N chips of the procedural forest, for training."),
    ] = None,
    cut: CutOptions,
    split: SplitOptions,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows of the manifest.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 1,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Cut pairs of image and canopy height into training chips.

    The manifest has columns rgb_path, chm_path (paths count from its folder) and, if known, id, site, kind,
    split, crs, date_rgb, date_chm (or year_...), sensor or floor_m, gedi_path, licence. Rows without chm_path
    become chips without heights, for canopy pretrain. Given splits are kept; the rest is split by
    blocks of ground. DIR gets shards/, index.csv and .parquet, summary.json and
    contact_sheet.png. Run it again to go on after an interruption or with a longer manifest: nothing is cut
    twice. Exit code 3 when some files could not be read (index.csv says which).

    With --synth there is no manifest; canopy train mixes such chips in by data.chips=[chips,synth].

    Example: canopy data chips --manifest pairs/manifest.csv -o chips --hold-out 'WLOU*' --workers 4
    """
    if (manifest is None) == (synth is None):
        raise InputError("needs either --manifest or --synth")
    setup_logging(quiet, verbose)
    if out_dir.is_dir():  # it may be gone on with, but not over its own manifest
        check_output([out_dir / name for name in _OF_CHIPS], [manifest], overwrite=True)
    with progress_bar(quiet or json_) as progress:
        if manifest is None:
            refuse_given(
                context, *_OF_PAIRS, where="--synth", because="synthetic chips are drawn, not cut or split"
            )
            summary, told = _synth(out_dir, synth or 0, cut, split, overwrite, progress)
        else:
            summary, told = _pairs(manifest, out_dir, cut, split, limit, workers, overwrite, progress)
    if json_:
        print_json(summary)
    elif not quiet:
        typer.echo(f"{out_dir}: {told}")
    if summary.get("unreadable"):
        typer.echo(f"canopy: {summary['unreadable']} chips could not be read; see index.csv", err=True)
        raise typer.Exit(3)


def _pairs(
    manifest: Path,
    out_dir: Path,
    cut: CutOptions,
    split: SplitOptions,
    limit: int | None,
    workers: int,
    overwrite: bool,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    from canopy.chips.write import table, write_chips

    summary = write_chips(
        manifest, out_dir, cut, split,
        limit=limit, workers=workers, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    return summary, f"{table(summary)}\n{summary['cut_now']} of {summary['shards']} shards cut now"


def _synth(
    out_dir: Path, count: int, cut: CutOptions, split: SplitOptions, overwrite: bool, progress: Progress
) -> tuple[dict[str, Any], str]:
    from canopy.chips.write import write_synth

    seed = _FIRST_SEED + split.seed
    summary = write_synth(out_dir, count, cut.size_px, seed, overwrite=overwrite, progress=progress)
    return summary, f"{count} synthetic chips, {'made' if summary['cut_now'] else 'there already'}"


_POLICY = "zero: 0 m of canopy; mask: nodata; keep: as canopy."
_HELP_CRS = "CRS of the CHM, in metres; also of files that carry none. Default: the points' own, or UTM."
_HELP_GROUND = "auto, class (LAS class 2) or csf (cloth simulation)."
_HELP_UNITS = "Unit of elevations: auto (as the file says, else that of x and y), m, ft or us-ft."

_OF_POINTS = (
    "ground", "buildings", "water", "bridges", "wires", "pit_width_m", "fill_px", "workers",
)  # fmt: skip


@takes_groups
def chm(
    context: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="CHM.tif", help="GeoTIFF to write.")],
    place: AreaOptions,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[LIDAR]...", help="LAS, LAZ or COPC files.")
    ] = None,
    dsm: Annotated[Path | None, typer.Option("--dsm", help="Surface raster, instead of points.")] = None,
    dtm: Annotated[Path | None, typer.Option("--dtm", help="Terrain raster to subtract from it.")] = None,
    gsd: Annotated[float, typer.Option("--gsd", help="Ground metres per pixel.")] = 1.0,
    crs: Annotated[str | None, typer.Option("--crs", help=_HELP_CRS)] = None,
    input_crs: Annotated[
        str | None, typer.Option("--input-crs", help="CRS of files that carry none. Default: --crs.")
    ] = None,
    ground: Annotated[str, typer.Option("--ground", help=_HELP_GROUND)] = "auto",
    buildings: Annotated[str, typer.Option("--buildings", help=f"Class 6. {_POLICY}")] = "zero",
    water: Annotated[str, typer.Option("--water", help=f"Class 9. {_POLICY}")] = "zero",
    bridges: Annotated[str, typer.Option("--bridges", help=f"Class 17. {_POLICY}")] = "zero",
    wires: Annotated[str, typer.Option("--wires", help=f"Classes 13-16. {_POLICY}")] = "zero",
    units: Annotated[str, typer.Option("--units", help=_HELP_UNITS)] = "auto",
    pit_width_m: Annotated[
        float, typer.Option("--pit-width-m", help="Close holes in crowns up to this wide; 0 keeps them.")
    ] = 1.0,
    fill_px: Annotated[
        int, typer.Option("--fill-px", help="Interpolate pixels without returns this near to others.")
    ] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes.", show_default="up to 4")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Canopy height from lidar: point clouds, or a surface and a terrain raster.

    Writes a GeoTIFF with bands canopy_height (metres; nodata where there were no returns), point_density
    (returns per square metre) and valid (1 or 0).

    Examples:

      canopy data chm tile1.laz tile2.laz -o chm.tif

      canopy data chm forest.copc.laz -o chm.tif --gsd 0.5 --aoi stand.gpkg --buildings mask

      canopy data chm --dsm dsm.tif --dtm dtm.tif -o chm.tif
    """
    from canopy.errors import InputError
    from canopy.labels.chm import ChmOptions, Policy, chm_from_points, chm_from_rasters
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    options = ChmOptions(
        gsd=gsd, crs=crs, input_crs=input_crs, ground=ground,
        policy=Policy(buildings=buildings, water=water, bridges=bridges, wires=wires), units=units,
        pit_width_m=pit_width_m, fill_px=fill_px, workers=workers if workers is not None else _cores(),
        overwrite=overwrite,
    )  # fmt: skip
    if (dsm is None) != (dtm is None):
        raise InputError("one raster of two", where="--dsm, --dtm", expected="both of them")
    if dsm is not None and files:
        raise InputError("point clouds and rasters together", where="--dsm", expected="one or the other")
    if dsm is not None:
        refuse_given(
            context, *_OF_POINTS, where="--dsm", because="two rasters have no points, classes or returns"
        )
    check_output(out, [files, dsm, dtm, place.inputs], overwrite=overwrite)
    area = place.area()
    with progress_bar(quiet or json_) as progress:
        if dsm is not None and dtm is not None:
            facts = chm_from_rasters(dsm, dtm, out, options, area=area, progress=progress)
        else:
            facts = chm_from_points(files or [], out, options, area=area, progress=progress)
    _print(facts, json_, quiet)


def _cores() -> int:
    return min(4, os.cpu_count() or 1)


def _print(facts: dict[str, Any], json_: bool, quiet: bool) -> None:
    if json_:
        print_json(facts)
        return
    if quiet:
        return
    typer.echo(
        f"{facts['file']}: {facts['width_px']} x {facts['height_px']} px of {facts['gsd_m']:.3g} m, "
        f"{facts['crs']}, "
        f"mean height {facts['mean_height_m']:.1f} m, {facts['cover_2m']:.0%} above 2 m, "
        f"{facts['valid_fraction']:.1%} valid"
    )
    if "points_read" in facts:
        typer.echo(
            f"{facts['points_read']} points ({facts['points_noise']} noise), "
            f"{facts['points_per_m2']:.1f} per m2, ground from {facts['ground']}"
        )


_HELP_FILTER = (
    "strict: quality_flag 1, degrade_flag 0, sensitivity above 0.95 (0.98 in the tropics), little water, not "
    "urban, and all of loose. loose: sensitivity at least 0.5, a2 above 0.7, ground within 150 m of the "
    "elevation model. none."
)


@takes_groups
def gedi(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.h5...", help="GEDI L2A granules.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="SHOTS.parquet", help="GeoParquet, or .gpkg.")],
    place: AreaOptions,
    rh: Annotated[
        str, typer.Option("--rh", metavar="NN,NN", help="Relative heights to keep, 0 to 100.")
    ] = "95,98",
    filter_: Annotated[
        str, typer.Option("--filter", metavar="strict|loose|none", help=_HELP_FILTER)
    ] = "strict",
    l2b: Annotated[
        list[Path] | None,
        typer.Option("--l2b", metavar="FILE", help="L2B granule for cover and pai; may be repeated."),
    ] = None,
    l4a: Annotated[
        list[Path] | None,
        typer.Option("--l4a", metavar="FILE", help="L4A granule for biomass (agbd); may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and say what there is to read; stop there.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The good shots of GEDI L2A granules (version 2 or 3) in an area, as one GeoParquet table.

    A shot is the statistic of a 25 m disc located to about 10 m: compare it with discs, not with pixels.

    Examples:

      canopy data gedi GEDI02_A_*.h5 --bbox 38.03,-84.49 --size-m 20000 -o shots.parquet

      canopy data gedi a.h5 --bounds -84.6,37.9,-84.4,38.1 --filter loose --rh 50,98 --l4a b.h5 -o s.parquet
    """
    from canopy.labels.gedi import check_rh, extract_shots, filter_named, survey
    from canopy.labels.shots import check_shots_name
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    percents = check_rh(_numbers(rh))
    filter_named(filter_)
    check_shots_name(out, [*files, *(l2b or ()), *(l4a or ()), *place.inputs], overwrite)
    area = place.area()
    where = area.describe() if area else "all of the granules"
    if dry_run:
        _print_granules(survey(files, filter_), where, json)
        return
    log.info(f"{where}; {_count(files)}, filter {filter_}")
    with progress_bar(quiet or json) as progress:
        report = extract_shots(
            files,
            out,
            area=area,
            rh=percents,
            filter=filter_,
            l2b=l2b or (),
            l4a=l4a or (),
            overwrite=overwrite,
            progress=progress,
        )
    for note in report.notes:
        log.warning(f"note: {note}")
    _print_report(report, json, quiet)


def _numbers(text: str) -> list[int]:
    """ "95,98" -> [95, 98]. Raises InputError."""
    from canopy.errors import InputError

    try:
        return [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise InputError(
            f"{text!r} is not a list of whole numbers", where="--rh", expected="e.g. 95,98"
        ) from error


def _count(granules: Sequence[object]) -> str:
    return f"{len(granules)} granule{'s' * (len(granules) != 1)}"


def _print_granules(granules: list[Granule], where: str, json: bool) -> None:
    total = sum(granule.shots for granule in granules)
    if json:
        found = [
            {"file": str(g.path), "version": g.version, "shots": g.shots, "beams": g.beams} for g in granules
        ]
        print_json({"dry_run": True, "area": where, "granules": found, "shots": {"in_files": total}})
        return
    typer.echo(f"{where}; {_count(granules)}, {total} shots to look at")
    for granule in granules:
        typer.echo(
            f"{granule.path}: version {granule.version}, {len(granule.beams)} beams, {granule.shots} shots"
        )


def _print_report(report: ShotsReport, json: bool, quiet: bool) -> None:
    if json:
        print_json(report.to_dict())
    elif not quiet:
        tally = report.tally
        typer.echo(f"{report.out}: {tally.kept} of {tally.read} shots; {tally}")


app = typer.Typer(no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Data: synthetic scenes, lidar, GEDI and imagery."""


@app.command("synth")
def synth(
    out_dir: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the five files.")],
    seed: Annotated[int, typer.Option("--seed", help="What stands where; 0 is the demo's scene.")] = 0,
    size_m: Annotated[float, typer.Option("--size-m", help="Side of the square, metres.")] = 1000.0,
    gsd: Annotated[float, typer.Option("--gsd", help="Pixel side in metres, 0.1 to 5.")] = 0.5,
    gedi_jitter_m: Annotated[
        float, typer.Option("--gedi-jitter-m", help="Standard deviation of GEDI's position error per axis.")
    ] = 0.0,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """A procedural forest and everything that is known of it, all from the same trees.

    Writes DIR/rgb.tif (imagery), chm.tif (true height, metres), points.laz (classified lidar),
    gedi.h5 (GEDI L2A layout) and scene.json (place, what was planted, checksums).

    Example: canopy data synth -o scene --seed 7 --size-m 500
    """
    from canopy.runtime import progress_bar, setup_logging
    from canopy.synth.scene import write_scene

    setup_logging(quiet, verbose)
    with progress_bar(quiet or json_) as progress:
        facts = write_scene(
            out_dir,
            seed,
            size_m,
            gsd,
            gedi_jitter_m=gedi_jitter_m,
            overwrite=overwrite,
            progress=progress,
        )
    if json_:
        print_json(facts)
        return
    if quiet:
        return
    planted = facts["planted"]
    side = f"{facts['width_px']} x {facts['height_px']} px of {facts['spec']['gsd_m']:g} m"
    typer.echo(f"{out_dir}: {side}, {facts['crs']}")
    typer.echo(
        f"{planted['trees']} trees, tallest {planted['highest_m']:.1f} m, cover {planted['cover']:.0%}; "
        f"{planted['points']['total']} points, {planted['gedi']['count']} GEDI shots"
    )


app.command("chips")(chips)
app.command("chm")(chm)
app.command("gedi")(gedi)
app.command("list")(list_data)
app.command("describe")(describe)
app.command("get")(get)
app.command("verify")(verify)
