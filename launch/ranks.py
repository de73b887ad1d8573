"""How launch/pipeline.py starts the ranks of a stage: the deepspeed command, its environment, its output."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from muomni.dist.compiler import add_interpreter_folder
from muomni.dist.discovery import free_port
from muomni.errors import MachineError, PreemptedError

# What DeepSpeed's launcher makes of a rank that a SIGTERM ended before it could handle it.
_KILLED_BY_TERM = 256 - signal.SIGTERM
TRAIN = Path(__file__).resolve().with_name("train.py")


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def num_gpus() -> int:
    """GPUs that this process may use: none where DS_ACCELERATOR=cpu."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def count_ranks() -> int:
    """One rank a GPU; without GPUs two, which share the cores better than one rank's threads do."""
    return num_gpus() or min(2, num_cores())


def rank_environment(num_ranks: int) -> dict[str, str]:
    """The environment of the launcher: CPU cores shared between ranks, output not held back."""
    environ = dict(os.environ)
    add_interpreter_folder(environ)
    environ["PYTHONUNBUFFERED"] = "1"
    if not num_gpus():
        environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
        environ.setdefault("DS_ACCELERATOR", "cpu")  # else each process looks for GPUs and says so
    return environ


def train_argv(num_ranks: int, arguments: list[str]) -> list[str]:
    """The command that trains with so many ranks on this machine; raises MachineError."""
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.is_file():
        raise MachineError(
            f"{launcher} is missing; call this command with the Python of the environment "
            f"that `make install` made"
        )
    ranks = ["--quiet", "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    return [str(launcher), *ranks, str(TRAIN), *arguments]


def run_logged(command: list[str], log: Path, environ: dict[str, str]) -> int:
    """Run a launcher, copy its output to standard output and append it to `log`.

    SIGINT, SIGTERM and SIGUSR1 are passed on to the ranks as SIGTERM, so that they save and stop. Returns
    the launcher's exit code, that of PreemptedError also when the ranks were still starting.
    """
    is_stopped = False

    # A session of its own: Ctrl-C would reach the launcher, which ends without its ranks' exit code.
    process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        is_stopped = True
        print(f"{signal.Signals(number).name}: the ranks save and stop", flush=True)
        stop_ranks(process.pid)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in signals}
    try:
        with log.open("a", encoding="utf-8") as file:
            print(f"# {time.strftime('%F %T')} {shlex.join(command)}", file=file, flush=True)
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
        code = process.wait()
        was_starting = is_stopped and code == _KILLED_BY_TERM
        return PreemptedError.exit_code if was_starting else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:  # this process fails: leave no ranks behind
            kill_tree(process.pid)


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
