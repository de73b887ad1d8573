"""What a run prints before its first step and after its last one; imports no torch.

The banner comes first. Then each part of the start gets a line with its seconds, and until it ends, a terminal
shows it on the live line; elsewhere a long part gets a line every ten seconds.
"""

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from muomni import __version__
from muomni.io.count_progress import EVERY_S, duration
from muomni.io.live_line import LIVE_LINE, Ticker, is_terminal, styled, width

# Set once the banner is printed, for the ranks of a launcher.
BANNER_PRINTED = "MUOMNI_BANNER_PRINTED"
# When the command that started the launcher did so, in seconds of the epoch.
LAUNCH_TIME = "MUOMNI_LAUNCH_TIME"
# Set for the stages of a pipeline, which prints what comes next by itself.
IN_PIPELINE = "MUOMNI_IN_PIPELINE"
DRAW_EVERY_S = 0.5
_NAME_WIDTH, _MIN_VALUE_WIDTH = 11, 16


def banner(what: str, preset: str | None, data: str, run: Path) -> str:
    """What is going to be trained, on what, and where."""
    sizes = f", preset {preset}" if preset else ""
    title = styled(f"muomni {__version__}: train {what}{sizes}", "bold")
    return "\n".join([title, row("data", data), row("run", str(run))])


def row(name: str, value: str) -> str:
    """An indented line with a name and a value, wrapped on a terminal."""
    indent = "\n" + " " * (2 + _NAME_WIDTH)
    if is_terminal(sys.stdout):
        columns = max(_MIN_VALUE_WIDTH, width(sys.stdout) - len(indent))
        value = indent.join(textwrap.wrap(value, columns, break_on_hyphens=False) or [""])
    return f"  {styled(f'{name:<{_NAME_WIDTH}}', 'dim')}{value}"


class Startup:
    """The parts of a start and their seconds; prints nothing unless `is_shown`."""

    def __init__(self, is_shown: bool = False) -> None:
        self.is_shown = is_shown
        self._part: str | None = None
        self._total_s = 0.0
        self._ticker: Ticker | None = None
        self._created = time.time()
        if launched_at := os.environ.pop(LAUNCH_TIME, None):
            self._created = float(launched_at)
            self.begin("launcher")
            self._start_s -= max(0.0, time.time() - self._created)

    @property
    def age_s(self) -> float:
        """Seconds since the command was started."""
        return time.time() - self._created

    def __enter__(self) -> "Startup":
        return self

    def __exit__(self, *error: object) -> None:
        """Stop showing the current part, after an error or the end of the run."""
        self._stop_ticker()
        LIVE_LINE.hide()

    def begin(self, part: str) -> None:
        """End the current part and begin another one."""
        self._end()
        self._part, self._start_s = part, time.perf_counter()
        if self.is_shown:
            is_live = is_terminal(sys.stdout)
            self._ticker = (
                Ticker(self._draw, DRAW_EVERY_S) if is_live else Ticker(self._report, EVERY_S)
            )
            self._ticker.start()

    def finish(self) -> None:
        """End the last part; does nothing if the start is over."""
        if self._part is not None:
            self._end()
            self._print("total", self._total_s)

    def _stop_ticker(self) -> None:
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None

    def _end(self) -> None:
        self._stop_ticker()
        if self._part is not None:
            seconds = time.perf_counter() - self._start_s
            self._total_s += seconds
            self._print(self._part, seconds)
            self._part = None

    def _print(self, part: str, seconds: float) -> None:
        if self.is_shown:
            print(row("start", f"{part} {seconds:.1f} s"), flush=True)

    def _draw(self) -> None:
        text = f"{self._part} ... {time.perf_counter() - self._start_s:.0f} s"
        LIVE_LINE.draw(f"  {'start':<{_NAME_WIDTH}}{text}"[: width(sys.stdout) - 1])

    def _report(self) -> None:
        seconds = time.perf_counter() - self._start_s
        print(row("start", f"{self._part} ... {seconds:.0f} s so far"), flush=True)


def outcome(
    stage: str, best: tuple[str, float] | None, export: str, seconds: float, run: Path
) -> str:
    """What a finished run has reached, and what to do next."""
    lines = [styled(f"{stage} is finished", "bold") + f" after {duration(seconds)}"]
    if best is not None:
        lines.append(row("best", f"{best[0]} {best[1]:.4f}"))
    lines.append(row("export", export))
    if IN_PIPELINE not in os.environ:
        lines.append(next_steps(run, [stage]))
    return "\n".join(lines)


def next_steps(run: Path, stages: Sequence[str]) -> str:
    """Commands that use the exports of trained stages, the last of them first."""
    commands = [["muomni", "evaluate", "--stage", stages[-1], "--run", str(run)]]
    if "sft" in stages:
        commands.append(["muomni", "generate", "--run", str(run), "--text", "..."])
    name = styled("next".ljust(_NAME_WIDTH), "dim")  # not wrapped, to be copied
    return "\n".join(f"  {name}{styled(shlex.join(command), 'cyan')}" for command in commands)
