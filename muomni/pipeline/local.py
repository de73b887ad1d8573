"""Starts the ranks of a stage on this machine: DeepSpeed's launcher, its environment, its output."""

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

# What DeepSpeed's launcher makes of a rank that a SIGTERM ended before it could handle it.
_KILLED_BY_TERM = 256 - signal.SIGTERM
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def num_gpus() -> int:
    """GPUs that this process may use: none where DS_ACCELERATOR=cpu."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def count_ranks() -> int:
    """One rank a GPU; without GPUs two, which share the cores better than one rank's threads do."""
    return num_gpus() or min(2, num_cores())


def shareable_ranks(config: RunConfig, num_ranks: int) -> int:
    """The most ranks, up to `num_ranks`, that can share the micro-batches of a step evenly."""
    group = config.batch.micro_batches_per_step
    if group is None:
        return num_ranks
    return max(number for number in range(1, num_ranks + 1) if group % number == 0)


def rank_environment(num_ranks: int) -> dict[str, str]:
    """The environment of the launcher: CPU cores shared between ranks, output not held back."""
    environ = dict(os.environ)
    add_interpreter_folder(environ)
    environ["PYTHONUNBUFFERED"] = "1"
    if not num_gpus():
        environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
        environ.setdefault("DS_ACCELERATOR", "cpu")  # else each process looks for GPUs and says so
    return environ


def train_argv(num_ranks: int, arguments: list[str], first_gpu: int | None = None) -> list[str]:
    """The command that trains with so many ranks on this machine; raises MachineError.

    `first_gpu` gives the ranks the GPUs from this one on, where others work on the rest.
    """
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.is_file():
        raise MachineError(
            f"{launcher} is missing; call this command with the Python of the environment "
            f"that `make install` made"
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
    """A started launcher, whose output a thread copies to standard output and appends to a log.

    `prefix` begins each line on standard output, where several stages speak at once.
    """

    def __init__(
        self, command: list[str], log: Path, environ: dict[str, str], prefix: str = ""
    ) -> None:
        self._is_stopped = False
        # A session of its own: Ctrl-C would reach the launcher, which ends without its ranks' exit code.
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
        """The launcher's exit code once it has ended and its output is copied, None before.

        It is that of PreemptedError also when `stop` met ranks that were still starting.
        """
        code = self._process.poll()
        if code is None:
            return None
        self._copier.join()
        was_starting = self._is_stopped and code == _KILLED_BY_TERM
        return PreemptedError.exit_code if was_starting else code

    def stop(self) -> None:
        """Tell the ranks to save and stop; once is enough."""
        if not self._is_stopped and self._process.poll() is None:
            stop_ranks(self._process.pid)
        self._is_stopped = True

    def kill(self) -> None:
        """End it at once, with all its ranks, if it still runs."""
        if self._process.poll() is None:
            kill_tree(self._process.pid)
        self._copier.join()


@contextmanager
def on_stop_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM and SIGUSR1 call `stop` instead of ending this process."""

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

    The outer launcher would die of it alone, the inner one signals rank after rank.
    """
    for inner in psutil.Process(launcher).children():
        for rank in inner.children():
            rank.terminate()


def kill_tree(pid: int) -> None:
    """Kill a process and all below it."""
    top = psutil.Process(pid)
    for process in [*top.children(recursive=True), top]:
        process.kill()
