"""Read-only maps of many small files, of which a bounded number is open."""

import mmap
import os
from collections import OrderedDict

import numpy as np

from muomni.errors import DataError

_MAX_OPEN = 256


class MappedFiles:
    """The last `num` items of `dtype` in each file as an array; what stands before them is its header.

    A map costs some ten microseconds where `np.load` takes a hundred, which counts where each window of
    samples touches other shards. Raises DataError when a file is missing or too short.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._arrays: OrderedDict[str, np.ndarray] = OrderedDict()

    def __call__(self, path: str, num: int) -> np.ndarray:
        """Items [num] of a file; they stay valid after its map has left the cache."""
        if path in self._arrays:
            self._arrays.move_to_end(path)
            return self._arrays[path]
        if len(self._arrays) >= _MAX_OPEN:
            self._arrays.popitem(last=False)
        self._arrays[path] = _map(path, self.dtype, num)
        return self._arrays[path]


def _map(path: str, dtype: np.dtype, num: int) -> np.ndarray:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; copy the dataset again") from error
    try:
        num_bytes = os.fstat(descriptor).st_size
        start = num_bytes - num * dtype.itemsize
        if start < 0 or num_bytes == 0:
            raise DataError(
                f"{path} has {num_bytes} bytes, too few for {num} entries; copy the dataset again"
            )
        content = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(content, dtype=dtype, count=num, offset=start)
