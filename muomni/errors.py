"""The errors that muomni raises for its users, each with an exit code.

A user's mistake or a broken input becomes one of these: one sentence that names the thing and says
what to do. Commands print that sentence without a traceback (`exit_on_error`) and leave with
`exit_code`, so that batch scripts can decide whether to requeue. Anything else is a bug
and keeps its traceback.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MuomniError(Exception):
    """Base of all errors that are shown to the user as one sentence."""

    exit_code = 1
    # Set where other ranks may not meet the mistake, so that the rank that does says it itself.
    is_rank_local = False


class ConfigError(MuomniError):
    """A config file, an override or a command line contradicts itself or the machine."""

    exit_code = 2


class DataError(MuomniError):
    """A corpus, a shard or a sample is missing, broken or does not fit."""

    exit_code = 3


class UpstreamError(MuomniError):
    """The export of an earlier stage is missing or does not fit."""

    exit_code = 4


class CheckpointError(MuomniError):
    """A checkpoint is incomplete, damaged or belongs to another run."""

    exit_code = 5


class NonFiniteError(MuomniError):
    """Gradients or the loss stayed non-finite, or a weight is not finite."""

    exit_code = 6


class MachineError(MuomniError):
    """The machine lacks something that the command needs (a compiler, a package, a device)."""

    exit_code = 7


class PreemptedError(MuomniError):
    """A signal asked for a stop; the state was saved and the job should be submitted again."""

    exit_code = 85


@contextmanager
def exit_on_error(command: str, is_main: bool = True) -> Iterator[None]:
    """Turn a `MuomniError` inside the block into one line on standard error and its exit code.

    Of several ranks that find the same mistake only the speaker says it; a mistake of one rank alone is
    said by that one.
    """
    try:
        yield
    except MuomniError as error:
        if is_main or error.is_rank_local:
            print(f"{command}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
