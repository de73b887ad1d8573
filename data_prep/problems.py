"""Why a sample cannot be used, and the exception that readers and encoders raise for it."""

from dataclasses import dataclass

# The reason code of records that are not understood; `corpus.py` has the others.
BAD_RECORD = "bad-record"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a sample cannot be used: a reason code and a message."""

    reason: str
    message: str


class BadSampleError(Exception):
    """Raised while encoding a sample; the sharder skips and lists the sample."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(reason, message)
