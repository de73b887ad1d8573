"""Start of a process as a rank: its environment, and the end of its launcher.

A launcher that is killed, or DeepSpeed's front end at SIGTERM, leaves ranks that nobody controls. They notice
within a second and stop as on SIGTERM, so that a training run saves its state.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

import psutil

from muomni.distributed.devices import use_assigned_gpus, uses_cpu
from muomni.distributed.discovery import Ranks, cores_of_rank

# The process id of the command that started the launcher, for its ranks.
LAUNCHER_PID = "MUOMNI_LAUNCHER_PID"
_PROGRAMS = {"deepspeed", "torchrun"}
_MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"}
_POLL_S = 1.0


def start_rank(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Prepare this process as a rank; call it before torch is imported."""
    use_assigned_gpus(environ)
    set_defaults(ranks, environ)
    watch_launchers(environ)


def set_defaults(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Set threads, allocator, and Triton's cache unless the user has.

    Threads: the cores of the node are divided over its ranks. Allocator: batches differ in length, which
    fragments memory without expandable segments. Cache: the home folder may be on a shared file system.
    """
    if ranks.world_size > 1 and "OMP_NUM_THREADS" not in environ:
        environ["OMP_NUM_THREADS"] = str(cores_of_rank(environ))
    if not uses_cpu(environ) and "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not uses_cpu(environ) and "TRITON_CACHE_DIR" not in environ:
        folder = Path(tempfile.gettempdir(), f"triton-{os.getuid()}")
        with suppress(
            OSError
        ):  # without a writable folder for temporary files, Triton's default remains
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid == os.getuid():  # Triton executes what it finds there
                environ["TRITON_CACHE_DIR"] = str(folder)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save and stop. Under `nohup`, the end of the terminal does not."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return numbers
    return (*numbers, signal.SIGHUP)


def watch_launchers(environ: Mapping[str, str]) -> None:
    """Send SIGTERM to this process once one of its launchers has ended; returns at once."""
    chain = launchers_above(environ)
    if len(chain) > 1:
        threading.Thread(target=_watch, args=(chain,), daemon=True).start()


def launchers_above(environ: Mapping[str, str]) -> list[psutil.Process]:
    """This process and the launchers above it, from the bottom up.

    Shells and `nohup` do not count: ranks outlive them on purpose.
    """
    own = psutil.Process()
    parents = own.parents()
    pids = [str(parent.pid) for parent in parents]
    if (top := environ.get(LAUNCHER_PID)) in pids:
        return [own, *parents[: pids.index(top) + 1]]
    chain = [own]
    for parent in parents:
        if not _is_launcher(parent):
            break
        chain.append(parent)
    return chain


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    # The program itself or the script of an interpreter; later words may be names of data.
    is_program = any(Path(word).name in _PROGRAMS for word in words[:2])
    return is_program or any(words[i : i + 2] == ["-m", name] for i in (1, 2) for name in _MODULES)


def _watch(chain: list[psutil.Process]) -> None:
    while all(map(_is_parent, chain[1:], chain)):
        time.sleep(_POLL_S)
    try:
        print("the launcher of this rank ended; the rank stops", file=sys.stderr, flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _is_parent(parent: psutil.Process, child: psutil.Process) -> bool:
    """Whether the parent still runs; the system gives its children another one when it ends."""
    try:
        return child.ppid() == parent.pid
    except psutil.NoSuchProcess:
        return False
