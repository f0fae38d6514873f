"""`canopy models`: what models there are, and what is in a file."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from canopy.cli.common import Json, print_json
from canopy.cli.convert import convert
from canopy.cli.quantize import quantize

app = typer.Typer(no_args_is_help=True)
app.command("convert")(convert)
app.command("quantize")(quantize)


@app.command("list")
def list_models(json_: Json = False) -> None:
    """Models by the names that --model takes: embedded ones, and published ones that are downloaded.

    Example: canopy models list
    """
    from canopy.models.catalogue import facts as published_facts
    from canopy.models.catalogue import published_models
    from canopy.models.registry import EMBEDDED, WEIGHTS_DIR, describe

    shipped = {name: WEIGHTS_DIR / file for name, file in EMBEDDED.items()}
    rows = {name: describe(path) for name, path in shipped.items() if path.is_file()}
    published = {name: published_facts(entry) for name, entry in published_models().items()}
    if json_:
        print_json({"models": rows, "published": published})
        return
    for name, facts in rows.items():
        licence = facts["card"].get("licence", "licence not stated")
        typer.echo(f"{name:19} {facts['name']}: {_headline(facts)}; {licence}; embedded")
    for name, facts in published.items():
        typer.echo(
            f"{name:19} {facts['title']}: {facts['size_gb']:g} GB; {facts['licence']}; {facts['source']}"
        )
        typer.echo(f"{'':19} {facts['origin']}; {facts['how']}")


@app.command("info")
def info(
    name_or_file: Annotated[str, typer.Argument(metavar="NAME|FILE", help="An embedded name or a file.")],
    json_: Json = False,
) -> None:
    """What a model expects, what it was trained on, and how well it did.

    A published model is described from the table, without downloading it.

    Example: canopy models info default
    """
    from canopy.models.catalogue import facts as published_facts
    from canopy.models.catalogue import published_models
    from canopy.models.registry import EMBEDDED, describe, resolve_model

    table = {} if name_or_file in EMBEDDED else published_models()
    if name_or_file in table:
        _print_published(name_or_file, published_facts(table[name_or_file]), json_)
        return
    facts = describe(resolve_model(name_or_file))
    if json_:
        print_json(facts)
        return
    card = facts["card"]
    lines = {
        "model": facts["name"],
        "file": f"{facts['path']} ({facts['bytes'] / 1e6:.1f} MB)",
        "sha256": facts["sha256"],
        "input": f"{', '.join(facts['bands'])} at {facts['gsd_m']} m, crops of {facts['crop_px']} px",
        "parameters": f"{facts['parameters'] / 1e6:.1f} M",
        "licence": card.get("licence", "not stated"),
        "trained": f"{card.get('date', 'date not stated')}, {card.get('minutes', '?')} minutes",
    }
    for key, value in lines.items():
        typer.echo(f"{key:11} {value}")
    _print_scores(card)


def _print_published(name: str, facts: dict[str, Any], json_: bool) -> None:
    if json_:
        print_json({"name": name, **facts})
        return
    for key in ("title", "licence", "source", "size_gb", "parameters_m", "gsd_m", "origin", "how", "notes"):
        if facts.get(key):
            typer.echo(f"{key:12} {facts[key]}")


def _headline(facts: dict[str, Any]) -> str:
    pooled = facts["card"].get("val", {}).get("all")
    score = f", val MAE {pooled['mae_m']:.2f} m, r {pooled['r']:.2f}" if pooled else ""
    return f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['gsd_m']} m pixels{score}"


def _print_scores(card: dict[str, Any]) -> None:
    for split in ("val", "test"):
        table = card.get(split) or {}
        if table:
            typer.echo(f"{split} scores at 1 m (MAE, r, bias):")
        for site, row in table.items():
            typer.echo(f"  {site:60.60} {row['mae_m']:6.2f} m  {row['r'] or 0:5.2f}  {row['bias_m']:+6.2f} m")
