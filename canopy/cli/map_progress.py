"""Progress of a regional run: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from canopy.runtime import log

if TYPE_CHECKING:
    from canopy.inference.region.drive import Tally, Watcher
    from canopy.inference.region.ledger import Ledger

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
        from canopy.inference.region.run import elapsed_text

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
