"""Read files in tars that a corpus consists of."""

import os
from functools import lru_cache

from data_prep.corpus import MISSING_MEDIA, BadSampleError, Member

# Samples of a tar are read one after the other, in any order.
_NUM_OPEN_TARS = 8


class _OpenTar:
    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def read_member(member: Member) -> bytes:
    """The bytes of a file in a tar; raises `BadSampleError` if the tar is missing or shorter."""
    try:
        data = os.pread(_open(member.path).descriptor, member.num_bytes, member.start)
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {member}: {error.strerror}") from error
    if len(data) < member.num_bytes:
        raise BadSampleError(MISSING_MEDIA, f"{member.path} ends inside {member.name}")
    return data


@lru_cache(maxsize=_NUM_OPEN_TARS)
def _open(path: str) -> _OpenTar:
    return _OpenTar(path)
