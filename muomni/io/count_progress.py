"""Progress of a count: a bar on a terminal, otherwise a line every ten seconds, on standard error."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from muomni.io.live_line import Ticker, is_terminal

EVERY_S = 10.0
T = TypeVar("T")


class Progress(Protocol):
    """Counts what is done."""

    def update(self, n: int = 1) -> object: ...


class ProgressLines:
    """Prints the count at most every `every_s` seconds, when it is updated."""

    def __init__(
        self, total: int | None, name: str, unit: str = "samples", every_s: float = EVERY_S
    ) -> None:
        self._total, self._name, self._unit, self._every_s = total, name, unit, every_s
        self._count = self._num_shown = 0
        self._start_s = self._shown_s = time.monotonic()
        self._lock = threading.Lock()

    def update(self, n: int = 1) -> None:
        """Count `n` more; zero keeps the line alive. May be called by several threads."""
        with self._lock:
            self._update(n)

    def _update(self, n: int) -> None:
        self._count += n
        now = time.monotonic()
        if now - self._shown_s < self._every_s:
            return
        rate = (self._count - self._num_shown) / (now - self._shown_s)
        self._shown_s, self._num_shown = now, self._count
        of, eta = "", ""
        if self._total:
            of = f"/{self._total:,} ({self._count / self._total:.0%})"
            left_s = (now - self._start_s) * (self._total / max(1, self._count) - 1)
            eta = f", eta {duration(left_s)}" if self._count else ""
        line = f"{self._name}: {self._count:,}{of} {self._unit}, {rate:,.1f}/s{eta}"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def open_progress(
    total: int | None, name: str, unit: str = "samples", is_shown: bool = True
) -> Iterator[Progress]:
    """Show the progress of a count of `total`, which may be unknown, also while it does not change."""
    if not is_shown:
        yield ProgressLines(total, name, unit, float("inf"))
        return
    if not is_terminal(sys.stderr):
        lines = ProgressLines(total, name, unit, EVERY_S)
        ticker = Ticker(lambda: lines.update(0), EVERY_S)
        ticker.start()
        try:
            yield lines
        finally:
            ticker.stop()
        return
    from tqdm import tqdm

    with tqdm(
        total=total, desc=name, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, leave=False
    ) as bar:
        yield bar


def counted(
    items: Iterable[T], total: int | None, name: str, unit: str = "samples", is_shown: bool = True
) -> Iterator[T]:
    """The items, with progress."""
    with open_progress(total, name, unit, is_shown) as progress:
        for item in items:
            yield item
            progress.update(1)


@contextmanager
def working(describe: Callable[[], str], every_s: float = EVERY_S) -> Iterator[None]:
    """Print what is going on and for how long, every `every_s` seconds, while the block runs."""
    start_s = time.monotonic()

    def report() -> None:
        line = f"{describe()}, {duration(time.monotonic() - start_s)} so far"
        print(line, file=sys.stderr, flush=True)

    ticker = Ticker(report, every_s)
    ticker.start()
    try:
        yield
    finally:
        ticker.stop()


def duration(seconds: float) -> str:
    """`75` as `1:15`, an hour and more as `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
