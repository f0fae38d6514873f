"""`canopy map`: parse, call, print."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from canopy.cli.area import AreaOptions
from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json, was_typed
from canopy.cli.groups import takes_groups
from canopy.cli.map_options import DryRun, RegionOptions, Resume, RetryFailed, Status, Verify
from canopy.cli.predict_options import PredictionOptions

if TYPE_CHECKING:
    from canopy.inference.region.cost import RegionCost
    from canopy.inference.region.plan import Prepared
    from canopy.inference.region.run import RunResult
    from canopy.inference.region.settings import RegionSettings


@takes_groups
def map_(
    context: typer.Context,
    prediction: PredictionOptions,
    area: AreaOptions,
    region: RegionOptions,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    verify: Verify = False,
    status: Status = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
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
    from canopy.config import validate_settings
    from canopy.errors import ConfigError
    from canopy.inference.region.settings import RegionSettings
    from canopy.runtime import setup_logging

    setup_logging(quiet=quiet, verbose=verbose)
    if status is not None:
        _show_status(status, json)
        return
    if region.out is None:
        raise ConfigError("no folder was given", where="-o", expected="-o DIR")
    given = asdict(prediction) | asdict(area) | asdict(region)
    given["images"] = tuple(prediction.images or ())
    # Only what was typed: --resume takes the rest from the run. Both have the same defaults.
    given = {name: value for name, value in given.items() if was_typed(context, name)}
    settings = validate_settings(RegionSettings, given, where="canopy map")
    run_map(
        settings, resume=resume, retry_failed=retry_failed, verify=verify, dry_run=dry_run,
        overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip


def run_map(
    settings: RegionSettings,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Make (or go on with, or only plan) a regional run, say what happens, and exit with its code.

    Raises:
        CanopyError: see `canopy.inference.region.run`.
    """
    from canopy.cli.map_progress import watching
    from canopy.inference.region.cost import region_cost
    from canopy.inference.region.run import elapsed_text, prepare_run, start
    from canopy.runtime import log

    settings.parse_shard()
    prepared = prepare_run(settings, resume=resume, overwrite=overwrite)
    tiling = prepared.tiling
    tiles = tiling.count(prepared.aoi)
    new = overwrite or not (settings.folder / "run.json").exists()
    cost = region_cost(prepared) if dry_run or (new and settings.scheduler == "local" and not quiet) else None
    text = f"{prepared.aoi.describe()}, {tiles:,} tile{'' if tiles == 1 else 's'} of {tiling.tile_px} px"
    log.info(text + (f", ~{elapsed_text(cost.hours * 3600)}" if cost else ""))
    for note in prepared.notes:
        log.warning(f"note: {note}")
    if dry_run and cost:
        _show_cost(prepared, cost, json)
        return
    with watching(quiet) as watch:
        result = start(prepared, overwrite=overwrite, retry_failed=retry_failed, verify=verify, watch=watch)
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _print_result(result)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _show_status(folder: str, json: bool) -> None:
    from pathlib import Path

    from canopy.inference.region.run import elapsed_text
    from canopy.inference.region.state import status

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


def _show_cost(prepared: Prepared, cost: RegionCost, json: bool) -> None:
    from canopy.runtime import log

    if json:
        print_json(
            {"dry_run": True, "area": prepared.aoi.describe(), **cost.to_dict(), "notes": prepared.notes}
        )
        return
    for line in cost.lines():
        log.info(line)


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
    for tile, reason in result.failures[:10]:
        typer.echo(f"failed {tile}: {reason}")
    if len(result.failures) > 10:
        typer.echo(f"... and {len(result.failures) - 10} more; see canopy map --status {result.folder}")
    for name, path in result.outputs.items():
        typer.echo(f"{path}: {name}")
