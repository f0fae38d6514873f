"""`canopy map`: parse, call, print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canopy.cli.options import Json, Overwrite, Quiet, Verbose, print_json, takes_groups, was_typed
from canopy.region.options import MapOptions
from canopy.runtime import log

if TYPE_CHECKING:
    from canopy.region.plan import Region
    from canopy.region.run import RunResult

_RUN = "Run"


@takes_groups
def map_(
    context: typer.Context,
    options: MapOptions,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=_RUN,
            help="Go on with the run in -o; its area, imagery and model need not be given.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", rich_help_panel=_RUN, help="Give failed tiles another chance.")
    ] = False,
    status: Annotated[
        str | None,
        typer.Option(
            "--status", metavar="DIR", rich_help_panel=_RUN, help="Show how a run stands; do nothing."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=_RUN, help="Say tiles, imagery, hours and money; write nothing."
        ),
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Map a region in tiles: a job of hours or days that can be stopped, resumed and shared out.

    DIR/tiles holds the tiles, DIR/mosaic opens as one raster, DIR/catalog.json is a STAC catalog,
    DIR/ledger.sqlite says what became of every tile. Running the same command again goes on. Exit 3: some
    tiles failed; the ledger has the reasons.

    Examples:

      canopy map --aoi county.gpkg --imagery naip -o county --dry-run --price 2.5

      canopy map --aoi county.gpkg --imagery naip -o county --workers 4 --threads 1

      canopy map -o county --resume --scheduler tcp://head:8786

      canopy map --status county
    """
    from canopy.inference.output import commercial_use
    from canopy.region.plan import region_cost
    from canopy.region.run import prepare_run, start
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet=quiet, verbose=verbose)
    if status is not None:
        _show_status(status, json)
        return
    # Only what was typed: --resume takes the rest from the run.
    typed = {name: value for name, value in options if was_typed(context, name)}
    region = prepare_run(MapOptions.of(typed, "canopy map"), resume=resume, overwrite=overwrite)
    tiling = region.tiling
    tiles = sum(1 for _ in tiling.tiles(region.inputs.aoi))
    cost = region_cost(region) if dry_run else None
    text = f"{region.inputs.aoi.describe()}, {tiles:,} tile{'' if tiles == 1 else 's'} of {tiling.tile_px} px"
    log.info(text + (f", ~{elapsed_text(cost['hours'] * 3600)}" if cost else ""))
    made = region.inputs
    log.info(commercial_use(made.source.terms, str(made.model.card.get("licence", "")))[1])
    for note in made.notes:
        log.warning(f"note: {note}")
    if cost:
        _show_cost(region, cost, json)
        return
    with progress_bar(quiet) as progress:
        result = start(region, overwrite=overwrite, retry_failed=retry_failed, progress=progress)
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _print_result(result)
        if region.options.shard:
            typer.echo(f"after all shards, for catalog and mosaic: canopy map -o {result.folder} --resume")
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _show_status(folder: str, json: bool) -> None:
    from canopy.region.run import status

    found = status(Path(folder).expanduser())
    if json:
        print_json(found)
        return
    counts = found["tiles"]
    total = sum(counts.values())
    typer.echo(f"{found['area']}; model {found['model']}; begun {found['created']}")
    typer.echo(
        f"{counts['done'] + counts['empty']:,} of {total:,} tiles finished ({counts['empty']:,} empty), "
        f"{counts['running']:,} in work, {counts['pending']:,} to do, {counts['failed']:,} failed"
    )
    typer.echo(
        f"{found['km2_finished']:,.2f} of {found['km2']:,.2f} km2, {found['seconds_per_tile']:g} s a tile, "
        f"{elapsed_text(found['worker_seconds'])} of work"
    )
    if found["left_s"] is not None:
        typer.echo(f"{found['km2_per_hour']:,.3g} km2/h, {elapsed_text(found['left_s'])} left")
    for who in found["at_work"]:
        typer.echo(f"at work: process {who['pid']} on {who['host']}, for {elapsed_text(who['for_s'])}")
    for failed in found["failures"]:
        typer.echo(f"failed {failed['tile']}: {failed['reason']}")


def _show_cost(region: Region, cost: dict[str, Any], json: bool) -> None:
    if json:
        print_json(
            {"dry_run": True, "area": region.inputs.aoi.describe(), **cost, "notes": region.inputs.notes}
        )
        return
    log.info(f"{cost['tiles']:,} tiles, {cost['km2']:,.2f} km2, {cost['crops']:,} crops")
    log.info(
        f"imagery {cost['imagery_bytes'] / 1e9:,.2f} GB uncompressed (JPEG: about a tenth); "
        f"map {cost['map_bytes'] / 1e9:,.2f} GB uncompressed"
    )
    log.info(
        f"{cost['worker_hours']:,.2f} worker hours, {cost['hours']:,.2f} h with {cost['workers']} "
        f"worker{'' if cost['workers'] == 1 else 's'}, {cost['km2_per_hour']:,.1f} km2/h"
    )
    if cost["money"] is not None:
        log.info(f"{cost['money']:,.2f} at {cost['price_per_worker_hour']:g} an hour and worker")


def elapsed_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h` or `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _print_result(result: RunResult) -> None:
    counts = result.counts
    text = f"{result.folder}: {counts['done']:,} tiles"
    if counts["empty"]:
        text += f", {counts['empty']:,} empty"
    if counts["failed"]:
        text += f", {counts['failed']:,} FAILED"
    left = counts["pending"] + counts["running"]
    if left:
        text += f", {left:,} left"
    typer.echo(f"{text}, {result.totals['km2_finished']:,.2f} km2")
    # One damaged file fails many tiles: numbers of blocks and tries are no other cause.
    causes: dict[str, list[tuple[str, str]]] = {}
    for tile, reason in result.failures:
        causes.setdefault(re.sub(r"\d+", "", reason.removesuffix(")")), []).append((tile, reason))
    for failed in list(causes.values())[:10]:
        more, (tile, reason) = len(failed) > 1, failed[0]
        typer.echo(f"failed: {len(failed):,} tile{'s' * more} ({tile}{', ...' * more}): {reason}")
    if causes:
        typer.echo(f"each tile's reason: canopy map --status {result.folder}")
    for name, path in result.outputs.items():
        typer.echo(f"{path}: {name}")
