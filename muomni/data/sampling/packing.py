"""How the samples of a window share rows and micro-batches; only lengths are looked at.

Rows are filled by best-fit decreasing, Johnson (1973), "Near-optimal bin packing algorithms": the longest
document first, each into the row whose free space it fills best. Rows keep at most a handful of
tokens free on usual text. Micro-batches of audio clips hold neighbors in length, so that little is padded.
"""

import bisect

import numpy as np

_PLACE_BITS = 32
_STARTS_STEP = 64
_PLACE_MASK = (1 << _PLACE_BITS) - 1


def best_fit_rows(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack samples into rows of at most `capacity`; returns the places in `lengths` of each row.

    Each length is at most `capacity`. Ties keep their order.
    """
    rows: list[list[int]] = []
    free: list[int] = []  # sorted; free space in the upper bits, row in the lower ones
    descending = np.argsort(-lengths, kind="stable")
    for place, length in zip(descending.tolist(), lengths[descending].tolist(), strict=True):
        found = bisect.bisect_left(free, length << _PLACE_BITS)
        if found == len(free):
            row, space = len(rows), capacity - length
            rows.append([place])
        else:
            slot = free.pop(found)
            row, space = slot & _PLACE_MASK, (slot >> _PLACE_BITS) - length
            rows[row].append(place)
        if space:
            bisect.insort(free, space << _PLACE_BITS | row)
    return rows


def buckets(ascending: list[int], budget: int) -> list[int]:
    """Cut ascending lengths into runs whose count times longest stays within `budget`.

    Returns the end of each run. A single length is at most `budget`.
    """
    ends: list[int] = []
    start, num = 0, len(ascending)
    while start < num:
        # All of a run are at least as long as its first.
        most = min(num, start + budget // ascending[start])
        start = bisect.bisect_right(
            range(start + 1, most),
            budget,
            key=lambda last, first=start: (last + 1 - first) * ascending[last],
        ) + start + 1  # fmt: skip
        ends.append(start)
    return ends


def document_starts(document_ids: np.ndarray) -> np.ndarray:
    """Where documents begin in rows [R, T] that are laid end to end: int32 [N].

    Padding (0) forms documents, too, so that each position is in one. What comes behind the last document is
    R * T, once or more: N is a multiple of 64, so kernels and allocators see few sizes.
    """
    is_start = np.ones(document_ids.shape, dtype=bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = np.flatnonzero(is_start)
    num = (len(starts) // _STARTS_STEP + 1) * _STARTS_STEP
    filled = np.full(num, document_ids.size, dtype=np.int32)
    filled[: len(starts)] = starts
    return filled
