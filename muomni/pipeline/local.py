"""Start the ranks of a stage on this machine with DeepSpeed's launcher."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from muomni.config.run import RunConfig
from muomni.distributed.compiler import add_interpreter_folder
from muomni.distributed.discovery import free_port
from muomni.errors import MachineError, PreemptedError

# Exit code of DeepSpeed's launcher if SIGTERM killed a rank before its handler was installed.
_KILLED_BY_TERM = 256 - signal.SIGTERM
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def num_gpus() -> int:
    """Number of visible GPUs; 0 if DS_ACCELERATOR=cpu."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def count_ranks() -> int:
    """One rank per GPU; without GPUs two, which use the cores better than threads of one rank."""
    return num_gpus() or min(2, num_cores())


def shareable_ranks(config: RunConfig, num_ranks: int) -> int:
    """The largest number of ranks, up to `num_ranks`, that a global batch can be spread over."""
    return min(num_ranks, config.batch.max_ranks or num_ranks)


def rank_environment(num_ranks: int) -> dict[str, str]:
    """Return the environment of the launcher: threads per rank, unbuffered output."""
    environ = dict(os.environ)
    add_interpreter_folder(environ)
    environ["PYTHONUNBUFFERED"] = "1"
    if not num_gpus():
        environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
        environ.setdefault("DS_ACCELERATOR", "cpu")  # else each process warns that it found no GPU
    return environ


def train_argv(num_ranks: int, arguments: list[str], first_gpu: int | None = None) -> list[str]:
    """Return the command that trains with `num_ranks` ranks on this machine; raises MachineError.

    The ranks use the GPUs from `first_gpu` on; None: from 0.
    """
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.is_file():
        raise MachineError(
            f"{launcher} is missing; run this command with the Python of the environment created by "
            f"make install"
        )
    if first_gpu is None:
        ranks = ["--num_gpus", str(num_ranks)]
    else:
        gpus = range(first_gpu, first_gpu + num_ranks)
        ranks = ["--include", f"localhost:{','.join(map(str, gpus))}"]
    port = ["--master_port", str(free_port())]
    program = ["--no_local_rank", "--module", "muomni.cli", "train"]
    return [str(launcher), "--quiet", *ranks, *port, *program, *arguments]


class RunningRanks:
    """A running launcher; a thread copies its output to standard output and appends it to a log.

    `prefix` starts each line on standard output, to tell parallel stages apart.
    """

    def __init__(
        self, command: list[str], log: Path, environ: dict[str, str], prefix: str = ""
    ) -> None:
        self._is_stopped = False
        # A new session, because on Ctrl-C the launcher would exit without its ranks' exit code.
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        header = f"# {time.strftime('%F %T')} {shlex.join(command)}\n"
        self._copier = threading.Thread(target=self._copy, args=(log, header, prefix))
        self._copier.start()

    def _copy(self, log: Path, header: str, prefix: str) -> None:
        assert self._process.stdout is not None
        with log.open("a", encoding="utf-8") as file:
            file.write(header)
            file.flush()
            for line in self._process.stdout:
                file.write(line)
                file.flush()
                print(prefix + line, end="", flush=True)

    def poll(self) -> int | None:
        """Return the launcher's exit code after its output was copied, or None while it runs.

        If `stop` killed ranks that were still starting, this is the code of PreemptedError.
        """
        code = self._process.poll()
        if code is None:
            return None
        self._copier.join()
        was_starting = self._is_stopped and code == _KILLED_BY_TERM
        return PreemptedError.exit_code if was_starting else code

    def stop(self) -> None:
        """Make the ranks save and stop. Idempotent."""
        if not self._is_stopped and self._process.poll() is None:
            stop_ranks(self._process.pid)
        self._is_stopped = True

    def kill(self) -> None:
        """Kill the launcher and its ranks, if they still run."""
        if self._process.poll() is None:
            kill_tree(self._process.pid)
        self._copier.join()


@contextmanager
def on_stop_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM, and SIGUSR1 call `stop` instead of ending this process."""

    def handle(number: int, frame: FrameType | None) -> None:
        print(f"{signal.Signals(number).name}: the ranks save and stop", flush=True)
        stop()

    before = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_ranks(launcher: int) -> None:
    """Send SIGTERM to the ranks below DeepSpeed's two launcher processes.

    The outer launcher would exit without them, and the inner one signals ranks one by one.
    """
    for inner in psutil.Process(launcher).children():
        for rank in inner.children():
            rank.terminate()


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants."""
    top = psutil.Process(pid)
    for process in [*top.children(recursive=True), top]:
        process.kill()
