"""Tells the reader of remote datasets which samples come next, while the micro-batches go on to the loader."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from muomni.data.sampling.plan import MicroBatch
from muomni.data.views.base import ExampleReader

_NUM_AHEAD = 256
_NUM_BETWEEN = 32


class LookAhead:
    """The same micro-batches in the same order; the reader hears of those that follow.

    It sees up to 256 micro-batches ahead and speaks every 32. Planning is cheap beside reading.
    """

    def __init__(self, batches: Iterable[MicroBatch], reader: ExampleReader[Any]) -> None:
        self.batches = batches
        self.reader = reader

    def __iter__(self) -> Iterator[MicroBatch]:
        coming: deque[MicroBatch] = deque()
        batches = iter(self.batches)
        num_given = 0
        is_end = False
        while True:
            while not is_end and len(coming) < _NUM_AHEAD:
                batch = next(batches, None)
                is_end = batch is None
                if batch is not None:
                    coming.append(batch)
            if not coming:
                return
            if num_given % _NUM_BETWEEN == 0:
                ids = [index for batch in coming for row in batch.rows for index in row]
                self.reader.expect(np.array(ids, dtype=np.int64))
            num_given += 1
            yield coming.popleft()
