"""`canopy map`: parse, call, print.

Progress of a regional run: a bar on a terminal, a line a minute elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from canopy.cli.options import (
    Json,
    Overwrite,
    Quiet,
    RegionOptions,
    Resume,
    RetryFailed,
    Status,
    Verbose,
    Verify,
    print_json,
    takes_groups,
    was_typed,
)
from canopy.cli.options import MapDryRun as DryRun
from canopy.inference.options import PredictOptions
from canopy.runtime import log

if TYPE_CHECKING:
    from canopy.region.ledger import Ledger
    from canopy.region.plan import Prepared, RegionSettings
    from canopy.region.run import RegionCost, RunResult, Tally, Watcher


@takes_groups
def map_(
    context: typer.Context,
    prediction: PredictOptions,
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
    from canopy.region.plan import RegionSettings
    from canopy.runtime import setup_logging

    setup_logging(quiet=quiet, verbose=verbose)
    if status is not None:
        _show_status(status, json)
        return
    if region.out is None:
        raise ConfigError("no folder was given", where="-o", expected="-o DIR")
    given = prediction.model_dump() | asdict(region)
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
        CanopyError: see `canopy.region.run`.
    """
    from canopy.region.run import elapsed_text, prepare_run, region_cost, start
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

    from canopy.region.run import elapsed_text, status

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


LINE_EVERY_S = 60.0


class RegionProgress:
    """Shows tiles finished, pace, failures and time left.

    The pace counts from where the first tile was begun: before it, workers only load the model.
    """

    def __init__(self, ledger: Ledger, show: Callable[[int, int, str], None], every_s: float) -> None:
        counts, totals = ledger.counts(), ledger.totals()
        self._total = sum(counts.values())
        self._before = counts["done"] + counts["empty"] + counts["failed"]
        self._km2_left = totals["km2"] - totals["km2_finished"]
        self._show, self._every_s = show, every_s
        self._shown = time.monotonic()

    def update(self, tally: Tally, in_work: int) -> None:
        """Show how a run stands, if it is time to."""
        if time.monotonic() - self._shown < self._every_s:
            return
        self._shown = time.monotonic()
        self._show(self._before + tally.finished, self._total, self.text(tally, in_work))

    def text(self, tally: Tally, in_work: int) -> str:
        """`12.3 km2/h, 2 failed, 4 in work, 3.4 h left`."""
        from canopy.region.run import elapsed_text

        parts = [f"{tally.km2_per_hour:,.3g} km2/h"]
        if tally.failed:
            parts.append(f"{tally.failed} failed")
        parts.append(f"{in_work} in work")
        if tally.km2_per_hour > 0:
            left_s = (self._km2_left - tally.km2) / tally.km2_per_hour * 3600
            parts.append(f"{elapsed_text(max(0.0, left_s))} left")
        return ", ".join(parts)


@contextmanager
def watching(quiet: bool) -> Iterator[Callable[[Ledger], Watcher]]:
    """What makes the watcher of a run, once its ledger is open."""
    if quiet or not sys.stderr.isatty():

        def line(done: int, total: int, text: str) -> None:
            log.info(f"{done:,} of {total:,} tiles, {text}")

        yield lambda ledger: RegionProgress(ledger, line, LINE_EVERY_S)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("tiles"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting workers", total=None)

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        yield lambda ledger: RegionProgress(ledger, show, 0.5)
