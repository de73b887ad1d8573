"""Best-fit-decreasing packing of documents into rows of a fixed length.

Johnson (1973), "Near-optimal bin packing algorithms": the longest document first, each into the row
whose free space it fills best. Rows keep at most a handful of tokens free on usual text.
"""

import bisect

import numpy as np


def best_fit_rows(ids: np.ndarray, lengths: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Pack the samples `ids` into rows of at most `capacity`; returns the ids of each row.

    `lengths[i]` is the length of sample i, at most `capacity`. Ties keep the order of `ids`.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted (free space, row)
    for i in ids[np.argsort(-lengths[ids].astype(np.int64), kind="stable")]:
        length = int(lengths[i])
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([int(i)])
            space, row = capacity - length, len(rows) - 1
        else:
            space, row = free.pop(place)
            rows[row].append(int(i))
            space -= length
        if space > 0:
            bisect.insort(free, (space, row))
    return [tuple(row) for row in rows]
