"""Read files in tars that a corpus consists of."""

import io
import os
from functools import lru_cache
from typing import BinaryIO

from data_prep.corpus import MISSING_MEDIA, BadSampleError, Clip, Member

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


def open_audio(clip: Clip) -> BinaryIO:
    """The audio file that a segment is cut from; raises `OSError`, or as `read_member` does."""
    return open(clip.path, "rb") if clip.member is None else io.BytesIO(read_member(clip.member))


@lru_cache(maxsize=_NUM_OPEN_TARS)
def _open(path: str) -> _OpenTar:
    return _OpenTar(path)
