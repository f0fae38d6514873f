"""How long a device worked, without making it wait."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class StopWatch:
    """Adds up the time of its `with` blocks: by the clock, or by a GPU's events, read when they are due."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._begun: float | torch.cuda.Event = 0.0
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Sum so far; waits for a GPU."""
        self._collect(wait=True)
        return self._seconds

    def __enter__(self) -> StopWatch:
        self._begun = self._mark() if self._cuda else time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._begun, float):
            self._seconds += time.perf_counter() - self._begun
            return
        self._pending.append((self._begun, self._mark()))
        self._collect(wait=False)

    def _mark(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][1].query()):
            first, last = self._pending.popleft()
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
