"""Breakdown of the step time into sections, without synchronization.

`mark` begins a section, which lasts until the next mark. On a CPU marks read the clock. On a GPU they are
events in the stream, which are read at logging steps only, so a section lasts as long as the device works on
it or waits for it.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

OTHER = "other"
# Events that may be unread; a GPU is never that many behind the host.
_MAX_UNREAD = 4096


class StepClock:
    """Seconds per section since the last `take`."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._section = OTHER
        self._seconds: dict[str, float] = {}
        self._unread: deque[tuple[str, torch.cuda.Event]] = deque()
        self._range: Any = None
        self._names_ranges = False
        self._last_s = time.perf_counter()
        if self._is_cuda:
            self._last_event = _event()

    @property
    def current(self) -> str:
        """The current section."""
        return self._section

    def mark(self, section: str) -> None:
        """End the current section and begin `section`."""
        if self._is_cuda:
            self._unread.append((self._section, _event()))
            if len(self._unread) > _MAX_UNREAD:
                self._read(len(self._unread) - _MAX_UNREAD // 2)
        else:
            now = time.perf_counter()
            before = self._section
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._last_s
            self._last_s = now
        self._section = section
        if self._names_ranges:
            self._close_range()
            self._open_range()

    @contextmanager
    def section(self, section: str) -> Iterator[None]:
        """Run the block as `section`, then resume the section that it interrupts."""
        before = self._section
        self.mark(section)
        try:
            yield
        finally:
            self.mark(before)

    def take(self) -> dict[str, float]:
        """Seconds of each section since the last call; waits for a GPU."""
        self.mark(self._section)
        if self._is_cuda:
            self._read(len(self._unread))
        seconds, self._seconds = self._seconds, {}
        return seconds

    def name_ranges(self, is_on: bool) -> None:
        """While on, sections appear as named ranges in the trace of a running profiler."""
        self._close_range()
        self._names_ranges = is_on
        if is_on:
            self._open_range()

    def _read(self, number: int) -> None:
        self._unread[number - 1][1].synchronize()
        for _ in range(number):
            section, event = self._unread.popleft()
            elapsed_s = self._last_event.elapsed_time(event) / 1000
            self._seconds[section] = self._seconds.get(section, 0.0) + elapsed_s
            self._last_event = event

    def _open_range(self) -> None:
        self._range = torch.profiler.record_function(self._section)
        self._range.__enter__()

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def step_breakdown(seconds: dict[str, float], num_steps: int) -> dict[str, float]:
    """Metrics of `num_steps` steps from `take`: seconds per step, and percent of the total."""
    total = sum(seconds.values()) or 1.0
    metrics: dict[str, float] = {}
    for section, spent in sorted(seconds.items()):
        metrics[f"time/{section}_s"] = spent / num_steps
        metrics[f"time/{section}_percent"] = 100 * spent / total
    return metrics
