"""Packs samples into sequences and buckets by length.

Sequences are packed by best-fit decreasing (Johnson, 1973, "Near-optimal bin packing algorithms"): the
longest document first, each into the sequence whose free space it fills best. For usual text a sequence
has a few free tokens at most. A bucket holds audio clips of similar length, which limits padding.
"""

import bisect

import numpy as np

_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_STARTS_MULTIPLE = 64


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack samples into sequences of at most `capacity`; returns the indices into `lengths` of each.

    Every length must be at most `capacity`. Ties keep their order.
    """
    sequences: list[list[int]] = []
    free: list[int] = []  # sorted; free space in the upper bits, index of the sequence in the lower
    descending = np.argsort(-lengths, kind="stable")
    for index, length in zip(descending.tolist(), lengths[descending].tolist(), strict=True):
        found = bisect.bisect_left(free, length << _INDEX_BITS)
        if found == len(free):
            number, space = len(sequences), capacity - length
            sequences.append([index])
        else:
            entry = free.pop(found)
            number, space = entry & _INDEX_MASK, (entry >> _INDEX_BITS) - length
            sequences[number].append(index)
        if space:
            bisect.insort(free, space << _INDEX_BITS | number)
    return sequences


def bucket_ends(ascending: list[int], budget: int) -> list[int]:
    """Split ascending lengths into buckets whose count times longest length is at most `budget`.

    Returns the end index of each bucket. Every length must be at most `budget`.
    """
    ends: list[int] = []
    start, num = 0, len(ascending)
    while start < num:
        # Every sample of a bucket is at least as long as its first.
        most = min(num, start + budget // ascending[start])
        start = bisect.bisect_right(
            range(start + 1, most),
            budget,
            key=lambda last, first=start: (last + 1 - first) * ascending[last],
        ) + start + 1  # fmt: skip
        ends.append(start)
    return ends


def document_starts(document_ids: np.ndarray) -> np.ndarray:
    """Start offsets of the documents in flattened sequences [B, T]: int32 [N].

    Padding (id 0) counts as documents, so every position belongs to one. The offsets are padded with B * T
    to a multiple of 64, with at least one pad: kernels and allocators then see few different sizes.
    """
    is_start = np.ones(document_ids.shape, dtype=bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = np.flatnonzero(is_start)
    num = (len(starts) // _STARTS_MULTIPLE + 1) * _STARTS_MULTIPLE
    padded = np.full(num, document_ids.size, dtype=np.int32)
    padded[: len(starts)] = starts
    return padded


def longest_document(starts: np.ndarray) -> int:
    """Length of the longest document of `document_starts`, rounded up to a power of two.

    Attention kernels launch work for this length, and compiled ones depend on it.
    """
    return 1 << (int(np.diff(starts).max()) - 1).bit_length()
