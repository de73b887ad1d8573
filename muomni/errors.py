"""Errors with exit codes, for user mistakes and invalid input.

The message is one sentence that names the cause and the remedy. Commands print it without a traceback
(`exit_on_error`) and exit with `exit_code`, so that batch scripts can decide whether to requeue. Any other
exception is a bug and keeps its traceback.
"""

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


class PreemptedError(MuomniError):
    """A signal requested a stop; the state was saved and the job should be requeued."""

    exit_code = 85


@contextmanager
def exit_on_error(command: str, is_main: bool = True) -> Iterator[None]:
    """Print a `MuomniError` as one line on stderr and exit with its code.

    Only the main rank prints, unless the error is `is_rank_local`.
    """
    try:
        yield
    except MuomniError as error:
        if is_main or error.is_rank_local:
            print(f"{command}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `" (did you mean 'x'?)"` when a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
