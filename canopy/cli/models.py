"""`canopy models`: what models there are, and what is in a file."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from canopy.cli.common import Json, print_json

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_models(json_: Json = False) -> None:
    """Embedded models, by the names that --model takes.

    Example: canopy models list
    """
    from canopy.models.registry import EMBEDDED, describe, resolve_model

    rows = {name: describe(resolve_model(name)) for name in EMBEDDED}
    if json_:
        print_json({"models": rows})
        return
    for name, facts in rows.items():
        typer.echo(f"{name:14} {facts['name']}: {_headline(facts)}")


@app.command("info")
def info(
    name_or_file: Annotated[str, typer.Argument(metavar="NAME|FILE", help="An embedded name or a file.")],
    json_: Json = False,
) -> None:
    """What a model expects, what it was trained on, and how well it did.

    Example: canopy models info default
    """
    from canopy.models.registry import describe, resolve_model

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
