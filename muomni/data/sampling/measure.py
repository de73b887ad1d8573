"""Lengths that depend on the tokenizer, computed once per split and kept beside it.

Shards store characters and seconds; tokens depend on the tokenizer and on the model's sizes. The cache
is a plain .npy named by a digest of everything that the lengths depend on; a stale one is never read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source
from muomni.errors import DataError
from muomni.io.hashing import sha256_bytes


def measured_lengths(
    source: Source, measure: Callable[[dict[str, Any]], int], depends_on: str
) -> Lengths:
    """`measure` of each sample; -1 marks samples that raised DataError.

    `depends_on` names all that `measure` depends on besides the samples. The first caller on a node
    computes; a cache that cannot be written (read-only corpus) only costs time. The cache is mapped,
    so that all ranks of a node share its memory.
    """
    digest = sha256_bytes(f"{source.fingerprint}|{source.split}|{depends_on}".encode())
    cache = source.manifests[0].root / source.split / f".lengths-{digest[:16]}.npy"
    if cache.is_file():
        lengths = np.load(cache, mmap_mode="r")
        if len(lengths) == len(source):
            return Lengths.of_array(lengths, depends_on)
    lengths = np.array([_length(source, i, measure) for i in range(len(source))], dtype=np.int32)
    if os.access(cache.parent, os.W_OK):
        _write(cache, lengths)
    return Lengths.of_array(lengths, depends_on)


def _length(source: Source, index: int, measure: Callable[[dict[str, Any]], int]) -> int:
    try:
        return measure(source.read(index))
    except DataError:
        return -1  # the loader meets the sample again, counts it and names it


def _write(cache: Path, lengths: np.ndarray) -> None:
    # Ranks may compute at the same time; each renames a whole file, all with the same bytes.
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, lengths)
    temporary.replace(cache)
