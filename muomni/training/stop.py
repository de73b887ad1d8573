"""Signals that ask for a stop, turned into a flag that all ranks agree on.

A launcher may reach one rank long before the others (DeepSpeed's signals rank after rank), so a rank
never acts on its own flag: the flag rides in the reduction that every step makes anyway.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Remembers the first signal that asked this rank to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends at once
        self.signal_name = signal.Signals(number).name

    @contextmanager
    def installed(self) -> Iterator["StopFlag"]:
        """Handle the signals inside the block; the handlers before it come back after it."""
        before = {number: signal.signal(number, self._set) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
