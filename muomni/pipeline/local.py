"""Start the ranks of a stage on this machine with DeepSpeed's launcher."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from muomni.config.run import RunConfig
from muomni.distributed.compiler import add_interpreter_folder
from muomni.distributed.devices import assign_gpus, check_gpus_usable, choose_gpus, uses_cpu
from muomni.distributed.discovery import free_port
from muomni.distributed.launcher import LAUNCHER_PID, num_cores, stop_signals
from muomni.errors import MachineError, PreemptedError
from muomni.io.console import SteadyStream
from muomni.io.live_line import LIVE_LINE, is_terminal, width
from muomni.observe.announce import LAUNCH_TIME
from muomni.observe.progress import as_live_line

POLL_S = 0.2
# Exit code of DeepSpeed's launcher if SIGTERM killed a rank before its handler was installed.
_KILLED_BY_TERM = 256 - signal.SIGTERM


def num_gpus() -> int:
    """Number of visible GPUs; 0 if DS_ACCELERATOR=cpu. Raises MachineError if torch cannot use them."""
    if uses_cpu(os.environ):
        return 0
    import torch

    number = torch.cuda.device_count()
    if number == 0:
        check_gpus_usable(os.environ)
    return number


def count_ranks() -> int:
    """One rank per GPU; without GPUs two, which use the cores better than threads of one rank."""
    return num_gpus() or min(2, num_cores())


def shareable_ranks(config: RunConfig, num_ranks: int) -> int:
    """The largest number of ranks, up to `num_ranks`, that a global batch can be spread over."""
    return min(num_ranks, config.batch.max_ranks or num_ranks)


def rank_environment(
    num_ranks: int, first_gpu: int = 0, num_sharing: int | None = None
) -> dict[str, str]:
    """Return the environment of a launcher of `num_ranks` ranks: GPUs, threads per rank, unbuffered output.

    The ranks use the visible GPUs from position `first_gpu` on. `num_sharing` ranks share the cores (default:
    `num_ranks`). Raises ConfigError if there are fewer GPUs.
    """
    environ = dict(os.environ)
    add_interpreter_folder(environ)
    environ["PYTHONUNBUFFERED"] = "1"
    environ[LAUNCHER_PID] = str(os.getpid())
    environ[LAUNCH_TIME] = str(time.time())
    environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // (num_sharing or num_ranks))))
    num_visible = num_gpus()
    if num_visible:
        assign_gpus(environ, choose_gpus(os.environ, num_visible, first_gpu, num_ranks))
    else:
        environ.setdefault("DS_ACCELERATOR", "cpu")  # else each process warns that it found no GPU
    return environ


def train_argv(num_ranks: int, arguments: list[str]) -> list[str]:
    """Return the command that trains with `num_ranks` ranks on this machine; raises MachineError.

    With --verbose among the `arguments`, the launcher prints what it does, too.
    """
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.is_file():
        raise MachineError(
            f"{launcher} is missing; run this command with the Python of the environment created by "
            f"make install"
        )
    ranks = ["--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    program = ["--no_local_rank", "--module", "muomni.cli", "train"]
    quiet = [] if {"-v", "--verbose"} & set(arguments) else ["--quiet"]
    return [str(launcher), *quiet, *ranks, *program, *arguments]


class RunningRanks:
    """A running launcher. With a log, a thread copies its output there and to standard output.

    `prefix` starts each line on standard output, to tell parallel stages apart.
    """

    def __init__(
        self, command: list[str], log: Path | None, environ: dict[str, str], prefix: str = ""
    ) -> None:
        self._is_stopped = self._is_signaled = False
        output: dict[str, Any] = {}
        if log is not None:
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # A new session, because on Ctrl-C the launcher would exit without its ranks' exit code.
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            **output,
        )
        self._copier = None
        if log is not None:
            header = f"# {time.strftime('%F %T')} {shlex.join(command)}\n"
            self._copier = threading.Thread(target=self._copy, args=(log, header, prefix))
            self._copier.start()

    def _copy(self, log: Path, header: str, prefix: str) -> None:
        assert self._process.stdout is not None
        # The ranks would block if their output were not read to its end.
        file = SteadyStream(log.open("a", encoding="utf-8"), partial(_report_log, log))
        file.write(header)
        file.flush()
        for line in self._process.stdout:
            file.write(line)
            file.flush()
            drawn = None if prefix else self._live_line(line)
            if drawn is None:
                print(prefix + line, end="", flush=True)
            else:
                LIVE_LINE.draw(drawn)
        LIVE_LINE.hide()
        file.close()

    @staticmethod
    def _live_line(line: str) -> str | None:
        """A line of progress, to redraw it in a terminal; None if it is to be printed."""
        if not is_terminal(sys.stdout):
            return None
        return as_live_line(line.rstrip("\n"), width(sys.stdout) - 1)

    def poll(self) -> int | None:
        """Return the launcher's exit code after its output was copied, or None while it runs.

        If `stop` killed ranks that were still starting, this is the code of PreemptedError.
        """
        code = self._process.poll()
        if code is None:
            if self._is_stopped:  # there may have been no ranks yet
                self._signal_ranks()
            return None
        if self._copier is not None:
            self._copier.join()
        was_starting = self._is_stopped and code == _KILLED_BY_TERM
        return PreemptedError.exit_code if was_starting else code

    def stop(self) -> None:
        """Make the ranks save and stop. Idempotent."""
        self._is_stopped = True
        self._signal_ranks()

    def _signal_ranks(self) -> None:
        if not self._is_signaled and self._process.poll() is None:
            self._is_signaled = stop_ranks(self._process.pid) > 0

    def kill(self) -> None:
        """Kill the launcher and its ranks, if they still run."""
        if self._process.poll() is None:
            kill_tree(self._process.pid)
        if self._copier is not None:
            self._copier.join()


def run_ranks(command: list[str], environ: dict[str, str]) -> int:
    """Run a launcher to its end and return its exit code; at a stop signal the ranks save and stop."""
    ranks = RunningRanks(command, None, environ)
    with on_stop_signal(ranks.stop):
        while (code := ranks.poll()) is None:
            time.sleep(POLL_S)
    return code


def _report_log(log: Path, error: OSError) -> None:
    print(f"cannot write {log} ({error.strerror}); the run continues without it", flush=True)


@contextmanager
def on_stop_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block, signals that stop a run call `stop` instead of ending this process."""

    def handle(number: int, frame: FrameType | None) -> None:
        print(f"{signal.Signals(number).name}: the ranks save and stop", flush=True)
        stop()

    before = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_ranks(launcher: int) -> int:
    """Send SIGTERM to the ranks below DeepSpeed's two launcher processes; returns their number.

    The outer launcher would exit without them, and the inner one kills each rank after 30 s.
    """
    number = 0
    with suppress(psutil.NoSuchProcess):  # they are ending
        for inner in psutil.Process(launcher).children():
            for rank in inner.children():
                rank.terminate()
                number += 1
    return number


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants."""
    top = psutil.Process(pid)
    for process in [*top.children(recursive=True), top]:
        process.kill()
