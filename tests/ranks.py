"""A warm pool of gloo ranks that tests send functions to.

Importing DeepSpeed and starting its process group takes 15-20 s, so the ranks are started once per
pytest session and shared. They are forked from a server that has already imported it
(tests/rank_imports.py, preloaded by tests/conftest.py), and share its memory. A test defines its body as a
top-level function and calls it on every rank (fixtures `one_rank` and `two_ranks` of tests/conftest.py):

    def sum_of_ranks(offset: int) -> int:
        ...torch.distributed, deepspeed.initialize, anything...

    def test_sum(two_ranks: RankPool) -> None:
        assert two_ranks.run(sum_of_ranks, offset=1) == [3, 3]

This module imports no torch: a rank sets its environment first.
"""

import atexit
import contextlib
import copy
import ctypes
import faulthandler
import gc
import inspect
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from muomni.distributed.compiler import add_interpreter_folder, missing_for_compiling
from muomni.distributed.deepspeed_import import import_deepspeed

START_TIMEOUT_S = 300.0  # includes compiling DeepSpeed's shared-memory op on a fresh machine
RUN_TIMEOUT_S = 120.0
STRAGGLER_GRACE_S = 5.0  # after one rank has failed, others may wait for it in a collective
LOG_TAIL_CHARS = 4000


class RankError(Exception):
    """A rank died, hung, or returned something that cannot be pickled."""


class RankTracebackError(Exception):
    """Traceback text of a rank, the cause of the reraised exception."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class RankPool:
    """`num_ranks` processes that have initialized torch.distributed and DeepSpeed.

    `device` is "cpu" (gloo), or "cuda" (NCCL, each rank with its own GPU). Ranks start at the first `run`, and
    again after a hang or death, so one bad test does not affect others. Before they start, the pools in
    `instead_of` are closed.
    """

    def __init__(
        self, num_ranks: int, instead_of: tuple["RankPool", ...] = (), device: str = "cpu"
    ) -> None:
        self.num_ranks = num_ranks
        self.device = device
        self._instead_of = instead_of
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._logs: list[Path] = []
        self._log_dir = tempfile.TemporaryDirectory(prefix="muomni-ranks-")
        atexit.register(self.close)

    def run(
        self, function: Callable[..., Any], *, timeout_s: float = RUN_TIMEOUT_S, **kwargs: Any
    ) -> list[Any]:
        """Call `function(**kwargs)` on every rank and return the results, ordered by rank.

        `function`, arguments, and results must be picklable; tensors are returned by value. An
        exception on a rank is reraised here, with that rank's traceback as its cause. After
        `timeout_s` the ranks are killed and RankError shows the stack of each.
        """
        payload = pickle.dumps((function, kwargs))
        if not self._processes:
            self._start()
        self._send("call", payload)
        replies = self._collect(timeout_s)
        failures = [reply for reply in replies if not reply[0]]
        if failures:
            self._raise(failures)
        self._settle()
        return [pickle.loads(reply[1]) for reply in replies]

    def close(self) -> None:
        """Stop the ranks, by force if they do not exit. Idempotent."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=3)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        for pool in self._instead_of:
            pool.close()
        # The fork server has imported DeepSpeed for CPUs.
        context: Any = multiprocessing.get_context(
            "forkserver" if self.device == "cpu" else "spawn"
        )
        port = _free_port()
        self._logs = []
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            log = Path(self._log_dir.name) / f"rank{rank}-{port}.log"
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.num_ranks),
                "LOCAL_SIZE": str(self.num_ranks),
                "LOCAL_WORLD_SIZE": str(self.num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": self.device,
                "OMP_NUM_THREADS": "1",
            }
            # Not daemonic, as a test may start data loader workers on a rank.
            process = context.Process(
                target=_serve, args=(theirs, environment, log), name=f"rank{rank}of{self.num_ranks}"
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._logs.append(log)
        failures = [reply for reply in self._collect(START_TIMEOUT_S) if not reply[0]]
        if failures:
            self._kill()
            self._raise(failures)

    def _send(self, action: str, payload: bytes) -> None:
        for rank, connection in enumerate(self._connections):
            try:
                connection.send((action, list(sys.path), payload))
            except BrokenPipeError:
                self._raise_dead(rank, {})

    def _collect(self, timeout_s: float) -> list[tuple[bool, Any, str]]:
        """Wait for a reply of every rank: (succeeded, pickled result or exception, traceback).

        Raises RankError if a rank dies or on timeout. If one rank fails and the others do not reply
        soon after, they are killed and their replies say so.
        """
        deadline_s = time.monotonic() + timeout_s
        replies: dict[int, tuple[bool, Any, str]] = {}
        has_failed = False
        while len(replies) < self.num_ranks:
            waiting = [rank for rank in range(self.num_ranks) if rank not in replies]
            timeout = max(0.0, deadline_s - time.monotonic())
            ready = wait([self._connections[rank] for rank in waiting], timeout)
            for rank in waiting:
                connection = self._connections[rank]
                if connection not in ready:
                    continue
                try:
                    replies[rank] = connection.recv()
                except EOFError:
                    self._raise_dead(rank, replies)
                if not replies[rank][0] and not has_failed:
                    has_failed = True
                    deadline_s = min(deadline_s, time.monotonic() + STRAGGLER_GRACE_S)
            if not ready:
                stacks = self._kill()
                if not has_failed:
                    raise RankError(
                        f"ranks {waiting} did not reply within {timeout_s:.0f} s and were stopped\n"
                        f"{stacks}"
                    )
                for rank in waiting:
                    replies[rank] = (False, None, f"did not return; last output:\n{stacks}")
        return [replies[rank] for rank in range(self.num_ranks)]

    def _raise_dead(self, rank: int, replies: dict[int, tuple[bool, Any, str]]) -> NoReturn:
        process = self._processes[rank]
        process.join(timeout=3)
        stacks = self._kill()
        before = "".join(text for succeeded, _, text in replies.values() if not succeeded)
        raise RankError(f"rank {rank} died with exit code {process.exitcode}\n{before}{stacks}")

    def _raise(self, failures: list[tuple[bool, Any, str]]) -> NoReturn:
        text = "\n".join(failure[2] for failure in failures)
        if self._processes:
            with contextlib.suppress(RankError):  # the ranks are stopped; `failures` has the reason
                self._settle()
        pickled = next((failure[1] for failure in failures if failure[1] is not None), None)
        error = RankError("a rank failed") if pickled is None else pickle.loads(pickled)
        raise error from RankTracebackError(text)

    def _settle(self) -> None:
        """Reset state that a function may have changed, and check that the ranks are in sync."""
        self._send("settle", b"")
        try:
            replies = self._collect(timeout_s=30.0)
        except RankError as error:
            raise RankError(f"the function left its ranks out of sync: {error}") from None
        failures = [reply for reply in replies if not reply[0]]
        if failures:
            self._kill()
            raise RankError("the function left its ranks out of sync") from RankTracebackError(
                "\n".join(failure[2] for failure in failures)
            )

    def _kill(self) -> str:
        """Abort all ranks and return the end of their output, which contains their stacks."""
        for process in self._processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGABRT)  # faulthandler writes all stacks
        for process in self._processes:
            process.join(timeout=3)
        tails = [
            f"--- output of rank {rank}:\n{log.read_text(errors='replace')[-LOG_TAIL_CHARS:]}"
            for rank, log in enumerate(self._logs)
            if log.exists()
        ]
        self.close()
        return "\n".join(tails)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(connection: Connection, environment: dict[str, str], log: Path) -> None:
    """Main function of a rank: start the process group, then serve calls until the session ends."""
    os.environ.update(environment)
    output = log.open("w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.enable(file=output, all_threads=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        restore = _start_process_group()
    except BaseException as error:
        connection.send(_failure(error))
        return
    connection.send((True, pickle.dumps(None), ""))
    while True:
        try:
            action, path, payload = connection.recv()
        except EOFError:
            sys.stdout.flush()
            os._exit(0)  # skips destructors of a process group whose peers may have exited
        try:
            if action == "call":
                sys.path[:] = path
                function, kwargs = pickle.loads(payload)
                result = function(**kwargs)
                del function, kwargs
                reply = (True, pickle.dumps(result), "")
                del result
            else:
                restore()
                reply = (True, pickle.dumps(None), "")
        except BaseException as error:
            reply = _failure(error)
        connection.send(reply)


def _start_process_group() -> Callable[[], None]:
    """Start the process group through DeepSpeed; returns a function that restores the current state."""
    import_deepspeed()
    import deepspeed
    import torch
    from deepspeed.utils import groups

    from muomni.training.engine.process_group import release_shared_memory

    torch.set_num_threads(1)
    add_interpreter_folder(os.environ)
    if missing_for_compiling(os.environ):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if os.environ["DS_ACCELERATOR"] == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False,
        timeout=timedelta(seconds=600),
    )  # fmt: skip
    if device.type == "cpu":
        release_shared_memory(os.environ)
    process_groups = torch.distributed.distributed_c10d._world.pg_map
    known_groups = set(process_groups)
    environment, folder = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (2, 10, 12, 15)}
    # DeepSpeed caches expert-parallel groups by size here; a later engine must build its own.
    cached = {
        name: copy.copy(value)
        for name, value in vars(groups).items()
        if not name.startswith("__")
        and not callable(value)
        and not inspect.ismodule(value)
        and (value is None or isinstance(value, (dict, list, int)))
    }

    def restore() -> None:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in cached.items():
            setattr(groups, name, copy.copy(value))
        # Each engine creates its own groups, whose threads would keep watching their connections.
        for group in [group for group in process_groups if group not in known_groups]:
            torch.distributed.destroy_process_group(group)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        random.seed(0)
        gc.collect()
        # The survivors are mostly a million objects of imported modules. Traversing them in each
        # collection took a third of the time of all training tests.
        gc.freeze()
        ctypes.CDLL(None).malloc_trim(0)
        # The sum is wrong if a peer is still in a different collective.
        token = torch.ones(1, device=device)
        torch.distributed.all_reduce(token)
        if int(token.item()) != torch.distributed.get_world_size():
            raise RankError(f"the ranks are out of sync: the sum of ones is {token.item()}")

    return restore


def _failure(error: BaseException) -> tuple[bool, bytes | None, str]:
    text = f"rank {os.environ.get('RANK')}:\n{traceback.format_exc()}"
    pickled = None
    with contextlib.suppress(Exception):
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # some exceptions pickle but cannot be rebuilt
    if pickled is None:
        pickled = pickle.dumps(RankError(f"{type(error).__name__}: {error}"))
    return (False, pickled, text)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
