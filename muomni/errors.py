"""Errors with exit codes, for user mistakes and invalid input.

The message is one sentence that names the cause and the remedy. Commands print it without a traceback
(`exit_on_error`) and exit with `exit_code`, so that batch scripts can decide whether to requeue. Any other
exception is a bug and keeps its traceback.
"""

import difflib
import errno
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# Errors of the machine, never of the program: full or failing disks, and exhausted limits.
_MACHINE_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
# Parts of messages of gloo and NCCL about a rank that ended.
_LOST_PEER = ("gloo/transport", "remote process exited")
_CLOSED_PIPE_CODE = 128 + 13  # as if ended by SIGPIPE
_PEER_GRACE_S = 5.0  # launchers check their ranks every second


class MuomniError(Exception):
    """Base class of all errors that are printed without a traceback."""

    exit_code = 1
    # True if other ranks may not raise the same error, so that this rank must print it.
    is_rank_local = False


class ConfigError(MuomniError):
    """A config file, override, or command line is invalid or does not match the machine."""

    exit_code = 2


class DataError(MuomniError):
    """A corpus, shard, or sample is missing, broken, or does not match."""

    exit_code = 3


class UpstreamError(MuomniError):
    """The export of an upstream stage is missing or does not match."""

    exit_code = 4


class CheckpointError(MuomniError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""

    exit_code = 5


class NonFiniteError(MuomniError):
    """The loss or gradients stayed non-finite, or a weight is non-finite."""

    exit_code = 6


class MachineError(MuomniError):
    """The machine lacks a requirement (a compiler, package, or device)."""

    exit_code = 7


class StorageError(MachineError):
    """Files of a run cannot be written; raised on all ranks."""


class PreemptedError(MuomniError):
    """A signal requested a stop; the state was saved and the job should be requeued."""

    exit_code = 85


@contextmanager
def exit_on_error(command: str, is_main: bool = True) -> Iterator[None]:
    """Print a `MuomniError`, or an OSError of the machine, as one line on stderr and exit with its code.

    Only the main rank prints, unless the error is `is_rank_local`. A closed standard output ends the program
    silently, except where `io.console` protects it.
    """
    try:
        yield
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has gone, as in `| head`; Python would complain again at its end.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_CLOSED_PIPE_CODE) from None
    except MuomniError as error:
        if is_main or error.is_rank_local:
            print(f"{command}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.errno not in _MACHINE_ERRNOS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"{command}: {error.strerror}{where}; fix that, then rerun the same command",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(MachineError.exit_code) from None


@contextmanager
def exit_rank_on_error(command: str, rank: int) -> Iterator[None]:
    """`exit_on_error` for a rank: inside a process group, it ends the process as soon as the error is printed.

    Python's normal end would wait for peers, which may wait for this rank in a collective. A rank that only
    lost its connection to another one lets that one's error and exit code come first.
    """
    try:
        with exit_on_error(command, is_main=rank == 0):
            yield
    except BaseException as error:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if any(part in str(error) for part in _LOST_PEER):
            time.sleep(_PEER_GRACE_S)
            reason = " ".join(str(error).split("\n")[0].split())
            print(
                f"{command}: rank {rank} lost its connection to another rank; see the error of that one "
                f"({reason})",
                file=sys.stderr,
            )
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `" (did you mean 'x'?)"` when a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
