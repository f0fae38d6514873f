"""How a run stands, for those who look on: `canopy map --status DIR`."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from canopy.errors import InputError
from canopy.inference.region import shards
from canopy.inference.region.ledger import STATES, Ledger
from canopy.inference.region.lock import live_holder
from canopy.inference.region.pins import RUN_FILE, read_pins, run_id

_MOST_FAILURES = 20


def outputs_digest(ledger: Ledger) -> str:
    """Hash of all finished tiles: catalog and mosaic are up to date while it stays the same."""
    digest = hashlib.sha256()
    for row in ledger.rows("done", "failed"):
        digest.update(f"{row.task.id} {row.state} {row.sha256}\n".encode())
    return digest.hexdigest()


def _sum(paths: list[Path], run: str) -> tuple[dict[str, int], dict[str, float], list[dict[str, str]]]:
    """Counts, totals and first failures of some ledgers of a run."""
    counts = dict.fromkeys(STATES, 0)
    totals = dict.fromkeys(("km2", "km2_finished", "worker_seconds", "bytes", "km2_per_hour"), 0.0)
    failures: list[dict[str, str]] = []
    for path in paths:
        with Ledger(path, read_only=True) as ledger:
            if ledger.get("run") != run:
                continue
            for state, count in ledger.counts().items():
                counts[state] += count
            for key, value in ledger.totals().items():
                totals[key] += value
            km2, in_s = ledger.pace()
            totals["km2_per_hour"] += km2 / in_s * 3600 if in_s > 0 else 0.0
            for row in ledger.rows("failed"):
                if len(failures) < _MOST_FAILURES:
                    failures.append({"tile": row.task.id, "reason": row.reason or ""})
    return counts, totals, failures


def status(folder: Path) -> dict[str, Any]:
    """Counts, area, failures and pace of a run, from all of its ledgers; changes nothing.

    Raises:
        InputError: no run there.
    """
    pins = read_pins(folder)
    if pins is None:
        raise InputError("no run there", where=folder, expected=f"a folder with {RUN_FILE}")
    main, parts = folder / "ledger.sqlite", list(shards.ledgers(folder))
    # The whole run's ledger is behind while shards are at work, and ahead of them afterwards.
    sums = [_sum(paths, run_id(pins)) for paths in ([main] if main.is_file() else [], parts)]
    counts, totals, failures = max(sums, key=lambda one: one[0]["done"] + one[0]["empty"] + one[0]["failed"])
    finished = counts["done"] + counts["empty"]
    holders = [holder for path in sorted(folder.glob(".lock*")) if (holder := live_holder(path))]
    left_km2, pace = totals["km2"] - totals["km2_finished"], totals["km2_per_hour"]
    return {
        "folder": str(folder),
        "area": pins["area"]["text"],
        "model": pins["model"]["name"],
        "created": pins["canopy"]["created"],
        "tiles": counts,
        "finished_fraction": finished / max(1, sum(counts.values())),
        **{key: round(value, 6) for key, value in totals.items()},
        "seconds_per_tile": round(totals["worker_seconds"] / max(1, counts["done"]), 3),
        "at_work": [
            {"host": h["host"], "pid": h["pid"], "for_s": round(time.time() - float(h["since"]))}  # type: ignore[arg-type]
            for h in holders
        ],
        "left_s": round(left_km2 / pace * 3600) if holders and pace > 0 else None,
        "failures": failures,
    }
