"""`canopy data`: what data there are and how to have them, and the synthetic forest: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canopy.cli.labels import chips, chm, gedi
from canopy.cli.options import Json, Overwrite, Quiet, Verbose, print_json, takes_groups
from canopy.errors import DataError, InputError, refuse_options
from canopy.inference.options import AreaOptions
from canopy.runtime import progress_bar, setup_logging

if TYPE_CHECKING:
    from canopy.geo.area import AOI
    from canopy.labels.fetch import Plan

_NO_COUNTRY = ("Worldwide", "elsewhere", "synthetic")  # listed last
_SHOWN = 20  # files that a plan lists by name

app = typer.Typer(no_args_is_help=True)
app.command("chips")(chips)
app.command("chm")(chm)
app.command("gedi")(gedi)


@app.callback()
def _data() -> None:
    """Data: synthetic scenes, lidar, GEDI and imagery."""


@app.command("list")
def list_data(json_: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Imagery sources by country (for `predict --imagery` and training), label sources, and models.

    Example: canopy data list
    """
    from canopy.imagery.named import all_sources
    from canopy.labels.catalog import known_labels, label_source
    from canopy.models.registry import published_models
    from canopy.terms import use_of

    setup_logging(quiet, verbose)
    labels = [label_source(name) for name in known_labels()]
    found: dict[str, dict[str, dict[str, Any]]] = {
        "imagery": {
            m.name: {
                "country": m.country,
                **m.model_dump(include={"title", "gsd_m", "licence", "dates", "season"}),
                "commercial_use": m.terms.commercial_use,
            }
            for m in sorted(all_sources(), key=lambda m: (m.country in _NO_COUNTRY, m.country, m.name))
        },
        "labels": {
            m.name: {"products": list(m.products), **m.model_dump(include={"title", "licence", "dates"})}
            for m in labels
        },
        "models": {
            name: {"title": m.title, "licence": m.licence, "commercial_use": use_of(m.licence)}
            for name, m in published_models().items()
        },
    }
    if json_:
        print_json(found)
        return
    for heading, rows in found.items():
        typer.echo(f"{heading}:")
        country = None
        for name, row in rows.items():
            if row.get("country") != country:
                country = row["country"]
                typer.echo(f"  {country}")
            use = f"; commercial use: {row['commercial_use']}" if "commercial_use" in row else ""
            typer.echo(f"  {name:29} {row['title']}; {row['licence']}{use}")


@app.command("describe")
def describe(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A source, a NEON site, a tile's file name, or a file.")
    ],
    band: Annotated[str | None, typer.Option("--band", help="Of a file: the height's band.")] = None,
    layer: Annotated[str | None, typer.Option("--layer", help="Of a vector file: its layer.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """All that is known of a source, or what would be taken from a file: bands, unit, nodata, CRS, date.

    A NEON site code (HARV) and a tile's file name are described too. Of a file that exists each reader that
    may meet it says what it takes or why it refuses, with the notes that the commands print.

    Example: canopy data describe neon
    """
    import yaml

    setup_logging(quiet, verbose)
    facts = _facts(name, band, layer)
    if json_:
        print_json(facts)
    else:
        known = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
        typer.echo(yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=10_000), nl=False)


def _facts(name: str, band: str | None, layer: str | None) -> dict[str, Any]:
    from canopy.config import manifest_names
    from canopy.imagery.named import named_source
    from canopy.labels.catalog import known_labels, label_source, neon_sites, read_name

    if name in known_labels():
        return {"labels": name, **label_source(name).model_dump(mode="json", exclude={"name"})}
    if name in manifest_names("imagery"):
        return {"imagery": name, **named_source(name).model_dump(mode="json", exclude={"name"})}
    if name.upper() in neon_sites():
        return neon_sites()[name.upper()]
    if Path(name).exists() or Path(name).is_symlink():  # a link to nowhere is the reader's to name
        from canopy.cli.describe import describe_file

        return describe_file(Path(name), band=band, layer=layer)
    tile = read_name(name)
    if tile is not None:
        return {"file": name, "bounds": list(tile.bounds), "crs": tile.crs}
    known = ", ".join([*known_labels(), *manifest_names("imagery")])
    raise InputError("no such file, source, NEON site or tile name", where=name, expected=f"one of {known}")


@app.command("get")
@takes_groups
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A label source; see `canopy data list`.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="DIR|FILE.tif", help="Folder for the files; of a map, the file."),
    ],
    place: AreaOptions,
    product: Annotated[
        str | None, typer.Option("--product", help="Kind of file; default: the source's.")
    ] = None,
    datetime: Annotated[
        str | None, typer.Option("--datetime", help="Such as 2019, 2019-07 or 2018/2021.")
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(
            "--date", metavar="DATE", help="Where surveys overlap: that nearest to it, not the newest."
        ),
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

    Of the published height maps (meta-v1, meta-v2) the area is cut out, with missing told from 0 m and a band
    acquisition_date, so that `compare` and `evaluate` can put any map beside them.

    Secrets come from the environment: NEON_API_TOKEN, EARTHDATA_TOKEN (or a netrc file).

    Examples:

      canopy data get neon --site HARV --bbox 42.54,-72.17 --size-m 2000 -o harv --dry-run

      canopy data get meta-v2 --bbox 42.54,-72.17 --size-m 2000 -o meta-v2.tif
    """
    from canopy.labels.catalog import label_source
    from canopy.labels.fetch import Wish, get_files
    from canopy.labels.hosts import plan_get

    setup_logging(quiet, verbose)
    area, silent = place.area(), quiet or json_
    if label_source(name).protocol == "quadkeys":
        given = {"--product": product, "--datetime": datetime, "--date": date, "--match": match}
        refuse_options(
            given | {"--site": tuple(site or ())}, where=name, because="a map is cut by area alone"
        )
        _cut(name, area, out, overwrite, dry_run, json_, silent)
        return
    wish = Wish(area=area, datetime=datetime, sites=tuple(site or ()), match=match, near=date)
    if area is not None and not silent:
        typer.echo(area.describe(), err=True)
    plan = plan_get(name, wish, product=product)
    if not silent:
        _print_plan(plan)
    facts = plan.facts()
    if not dry_run:
        if plan.sure_bytes > max_gb * 1e9 and not yes:
            raise InputError(
                f"{len(plan.files)} files of {plan.sure_bytes / 1e9:.1f} GB",
                expected=f"at most {max_gb:g} GB",
                remedy="ask for a smaller area, or add --yes",
            )
        with progress_bar(silent) as progress:
            fetched, kept = get_files(plan, out, overwrite=overwrite, progress=progress)
        facts |= {"fetched": fetched, "kept": kept, "folder": str(out)}
        if not silent:
            counts = f"{len(fetched)} fetched, {len(kept)} kept"
            typer.echo(f"{out}: {counts}; cite: {plan.manifest.citation}")
    if json_:
        print_json(facts)


def _cut(
    name: str, area: AOI | None, out: Path, overwrite: bool, dry_run: bool, json_: bool, silent: bool
) -> None:
    """A published map of an area, as one file."""
    from canopy.evaluation.published import cut_published
    from canopy.labels.catalog import label_source

    if area is None:
        raise InputError(f"{name} is cut by area", expected="--bbox, --bounds or --aoi")
    with progress_bar(silent) as progress:
        facts = cut_published(
            label_source(name), area, out, overwrite=overwrite, dry_run=dry_run, progress=progress
        )
    if json_:
        print_json(facts)
    elif not silent:
        told = f"{area.describe()}, {len(facts['tiles'])} tiles"
        if not dry_run:
            told = (
                f"{out}: {facts['width']} x {facts['height']} px of {facts['gsd_m']:.3g} m, "
                f"{facts['valid_fraction']:.1%} valid, images of {'/'.join(facts['dates']) or '?'}"
            )
        typer.echo(f"{told}; {facts['licence']}; cite: {facts['citation']}")


def _print_plan(plan: Plan) -> None:
    for file in plan.files[:_SHOWN]:
        day = f"  {file.day}" if file.day else ""
        typer.echo(f"{_size(file.bytes, file.about):>10}  {file.path}{day}")
    if len(plan.files) > _SHOWN:
        typer.echo(f"{'':10}  and {len(plan.files) - _SHOWN} more")
    total = _size(plan.total_bytes, any(file.about for file in plan.files))
    unknown = f", {plan.unknown} of unknown size" if plan.unknown else ""
    terms = f"{plan.manifest.licence}; {plan.manifest.attribution}"
    typer.echo(f"{len(plan.files)} files, {total}{unknown}; {terms}")
    for note in plan.notes:
        typer.echo(note, err=True)


def _size(count: int | None, about: bool) -> str:
    from rich.filesize import decimal

    return "?" if count is None else f"{'~' if about else ''}{decimal(count)}"


@app.command("verify")
def verify(
    name: Annotated[str, typer.Argument(metavar="NAME|DIR", help="A source, or a folder that `get` filled.")],
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a source's manifest against its schema, or the files of a folder against their checksums.

    `all` checks every manifest.

    Example: canopy data verify harv
    """
    from canopy.labels.fetch import verify_folder

    setup_logging(quiet, verbose)
    found: dict[str, Any] = verify_folder(name) if Path(name).is_dir() else {"manifests": _verified(name)}
    if json_:
        print_json(found)
    if found.get("problems"):
        first, what = next(iter(found["problems"].items()))
        raise DataError(
            f"{len(found['problems'])} of {found['files']} files have changed, such as {first}: {what}",
            where=name,
            remedy="fetch them again: `canopy data get` with --overwrite",
        )
    if not (json_ or quiet):
        valid = f"valid: {', '.join(found.get('manifests', ()))}"
        typer.echo(f"{name}: {found['files']} files are as they were fetched" if "files" in found else valid)


def _verified(name: str) -> list[str]:
    """Names of the manifests that were read and found valid."""
    from canopy.config import manifest_names
    from canopy.imagery.named import named_source
    from canopy.labels.catalog import known_labels, label_source, neon_site

    labels, imagery = known_labels(), manifest_names("imagery")
    if name not in ("all", *labels, *imagery):
        known = ", ".join([*labels, *imagery])
        raise InputError("no such folder or source", where=name, expected=f"a folder, all, or one of {known}")
    wanted = [*labels, *imagery] if name == "all" else [name]
    for one in wanted:
        if one in imagery:
            named_source(one)
            continue
        manifest = label_source(one)
        for partner in manifest.partners:
            if partner.imagery is not None:
                named_source(partner.imagery)
        for code in manifest.sites:
            neon_site(code)
    return wanted


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
    from canopy.synth.scene import write_scene

    setup_logging(quiet, verbose)
    with progress_bar(quiet or json_) as progress:
        facts = write_scene(
            out_dir, seed, size_m, gsd, gedi_jitter_m=gedi_jitter_m, overwrite=overwrite, progress=progress
        )
    if json_:
        print_json(facts)
    elif not quiet:
        planted = facts["planted"]
        side = f"{facts['width_px']} x {facts['height_px']} px of {facts['spec']['gsd_m']:g} m"
        typer.echo(f"{out_dir}: {side}, {facts['crs']}")
        typer.echo(
            f"{planted['trees']} trees, tallest {planted['highest_m']:.1f} m, cover {planted['cover']:.0%}; "
            f"{planted['points']['total']} points, {planted['gedi']['count']} GEDI shots"
        )
