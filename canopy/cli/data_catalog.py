"""`canopy data list | describe | get | verify`: what data there are, and how to have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canopy.cli.area import AreaOptions
from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json
from canopy.cli.groups import takes_groups

if TYPE_CHECKING:
    from canopy.sources.labels import Plan

_SHOWN = 20


def list_data(json_: Json = False) -> None:
    """Imagery sources (for `predict --imagery` and training), label sources, and models.

    Example: canopy data list
    """
    from canopy.models.catalogue import published_models
    from canopy.sources.label_manifest import known_labels, label_source
    from canopy.sources.manifest import all_sources

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
    from canopy.errors import InputError
    from canopy.sources.label_manifest import known_labels, label_source
    from canopy.sources.manifest import known_names, named_source
    from canopy.sources.naming import read_name
    from canopy.sources.neon_sites import aop_crs, neon_site, neon_sites

    if name in known_labels():
        return {"labels": name, **label_source(name).model_dump(mode="json", exclude={"name"})}
    if name in known_names():
        return {"imagery": name, **named_source(name).model_dump(mode="json", exclude={"name"})}
    if name.upper() in neon_sites():
        site = neon_site(name)
        crs = None if site.site == site.flight_site and site.utm_zone is None else aop_crs(site.site)
        return {**site.model_dump(mode="json"), "flight_site": site.flight_site, "flight_crs": crs}
    tile = read_name(name)
    if tile is not None:
        raster = list(getattr(tile, "raster_bounds", tile.bounds))
        return {"file": tile.filename, "bounds": list(tile.bounds), "raster_bounds": raster, "crs": tile.crs}
    known = ", ".join([*known_labels(), *known_names()])
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
    from canopy.runtime import progress_bar, setup_logging
    from canopy.sources.labels import get_files, plan_get
    from canopy.sources.remote_files import Wish

    setup_logging(quiet, verbose)
    area = place.choose()
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
    from canopy.sources.labels import verify_folder

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
    from canopy.errors import InputError
    from canopy.sources.label_manifest import known_labels, label_source
    from canopy.sources.manifest import known_names, named_source
    from canopy.sources.neon_sites import neon_sites

    labels, imagery = known_labels(), known_names()
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
