"""The length of each sample in the unit of a stage's batching, looked up when it is needed.

A table of 10^9 lengths would not fit into memory, so `Lengths` reads those of the given samples from
memory-mapped files beside the shards. Lengths in tokens depend on the tokenizer and the model's sizes:
`measured_lengths` computes them once per split and caches them beside it.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from muomni.config.models import MEL_RATE_HZ
from muomni.data.shards.parallel import map_ranges
from muomni.data.shards.source import Source
from muomni.errors import DataError
from muomni.io.atomic_write import open_atomic
from muomni.io.file_lock import exclusive_lock_if_supported
from muomni.io.hashing import sha256_bytes

# Above this number of samples, checks and averages use a subset.
MAX_FULL_SCAN = 4_000_000


class Lengths:
    """Lengths of the samples 0 ... `num_samples` - 1.

    `read` returns the lengths of an array of sample ids. `depends_on` names everything besides the
    samples that determines the lengths; the plan's digest includes it instead of the lengths.
    """

    def __init__(
        self, num_samples: int, read: Callable[[np.ndarray], np.ndarray], depends_on: str
    ) -> None:
        self.num_samples = num_samples
        self.depends_on = depends_on
        self._read = read

    @classmethod
    def of_array(cls, array: np.ndarray, depends_on: str = "") -> "Lengths":
        """Lengths from an array in memory or memory-mapped: int [num_samples]."""
        return cls(len(array), lambda ids: array[ids], depends_on)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """Lengths of the samples `ids`, int64 [len(ids)]."""
        return np.asarray(self._read(ids), dtype=np.int64)

    def clipped(self, low: int, high: int) -> "Lengths":
        """The same lengths, clipped to [low, high]."""
        return Lengths(
            self.num_samples,
            lambda ids: np.clip(self[ids], low, high),
            f"{self.depends_on} clipped={low}..{high}",
        )

    def all(self) -> np.ndarray:
        """All lengths, int64 [num_samples]; only for datasets that fit into memory."""
        return self[np.arange(self.num_samples)]


def evenly_spaced(num: int) -> np.ndarray:
    """0 ... num - 1, or `MAX_FULL_SCAN` evenly spaced numbers of them if there are more."""
    if num <= MAX_FULL_SCAN:
        return np.arange(num)
    return np.arange(MAX_FULL_SCAN) * num // MAX_FULL_SCAN


def mel_frames(source: Source, stretch: float = 1.0, extra: int = 0) -> Lengths:
    """Mel frames of each sample, from the durations in the column files.

    `stretch` is the largest factor by which augmentation lengthens an audio clip, `extra` the most frames
    that it adds. Rounded up, so that no audio clip is longer than planned.
    """

    def read(ids: np.ndarray) -> np.ndarray:
        duration_ms = source.column("duration_ms", ids)
        frames = np.ceil((duration_ms + 0.5) * stretch * MEL_RATE_HZ / 1000)
        return np.maximum(1, frames.astype(np.int64)) + extra

    depends_on = f"mel frames stretch={stretch}" + (f" extra={extra}" if extra else "")
    return Lengths(len(source), read, depends_on)


def measured_lengths(
    source: Source,
    measure: Callable[[dict[str, Any]], int],
    depends_on: str,
    num_workers: int = 1,
) -> Lengths:
    """`measure` of each sample, cached beside the shards; -1 for samples that raise DataError.

    `depends_on` names everything besides the samples that determines the result; a digest of it names
    the cache file, so a stale cache is never read. One process measures, by `num_workers` processes, while
    others wait for its file; without file locks, all measure. If the folder is read-only, nothing is cached.
    The file is memory-mapped, so the ranks of a node share its memory.
    """
    digest = sha256_bytes(f"{source.fingerprint}|{source.split}|{depends_on}".encode())
    cache = source.manifests[0].root / source.split / f".lengths-{digest[:16]}.npy"
    lengths = _load(cache, len(source))
    if lengths is not None:
        return Lengths.of_array(lengths, depends_on)
    measure_range = partial(_lengths_of_range, source, measure)

    def measure_all() -> np.ndarray:
        ranges = map_ranges(measure_range, len(source), num_workers)
        return np.concatenate([np.empty(0, dtype=np.int32), *ranges])

    if not os.access(cache.parent, os.W_OK):
        return Lengths.of_array(measure_all(), depends_on)
    with exclusive_lock_if_supported(cache.with_suffix(".lock")):
        lengths = _load(cache, len(source))  # another process may have measured meanwhile
        if lengths is None:
            lengths = measure_all()
            with open_atomic(cache) as file:
                np.save(file, lengths)
    return Lengths.of_array(lengths, depends_on)


def _load(cache: Path, num_samples: int) -> np.ndarray | None:
    """The complete lengths in a file, if there are any."""
    if not cache.is_file():
        return None
    lengths = np.load(cache, mmap_mode="r")
    return lengths if len(lengths) == num_samples else None


def _lengths_of_range(
    source: Source, measure: Callable[[dict[str, Any]], int], first: int, stop: int
) -> np.ndarray:
    return np.array([_length(source, i, measure) for i in range(first, stop)], dtype=np.int32)


def _length(source: Source, index: int, measure: Callable[[dict[str, Any]], int]) -> int:
    try:
        return measure(source.read(index))
    except DataError:
        return -1  # the loader counts and reports the sample
