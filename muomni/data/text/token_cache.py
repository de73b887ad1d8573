"""Token ids of all texts of a split, cached beside the shards, so each text is tokenized once.

Two files per split and tokenizer, little-endian and without a header:

    .tokens-DIGEST.ids      concatenated ids of all texts: uint16, or uint32 above 65,536 pieces
    .tokens-DIGEST.texts    `TEXT` of each sample: start and number of its ids, length in UTF-8 bytes

The digest covers samples and tokenizer, so a stale cache is never read. Both files can be deleted at any
time. They are memory-mapped, so the ranks and workers of a node share their memory.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from muomni.data.shards.parallel import map_ranges
from muomni.data.shards.reader import SplitReader
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError
from muomni.io.atomic_write import open_atomic
from muomni.io.file_lock import exclusive_lock_if_supported
from muomni.io.hashing import sha256_bytes

logger = logging.getLogger(__name__)

# `num_ids` is 0 for a sample without a usable text; reading the sample raises the error.
TEXT = np.dtype([("start", "<i8"), ("num_ids", "<i4"), ("num_bytes", "<i4")])

# Returns the ids of a sample's text and its length in UTF-8 bytes; raises DataError if it has none.
Encode = Callable[[dict[str, Any]], tuple[list[int], int]]


class TokenCache:
    """Token ids of the texts of one split of a dataset. Picklable; files are mapped on first use."""

    def __init__(self, reader: SplitReader, tokenizer: Tokenizer) -> None:
        depends_on = f"{reader.manifest.fingerprint}|{reader.split}|tokens {tokenizer.digest}"
        digest = sha256_bytes(depends_on.encode())
        self.folder: Path = reader.manifest.root / reader.split
        self._name = f".tokens-{digest[:16]}"
        self._num_texts = len(reader)
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._maps: tuple[np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": None}

    def is_complete(self) -> bool:
        """Whether both files exist and are complete."""
        try:
            texts, ids = self._map()
        except (OSError, ValueError):  # ValueError: the size is not a multiple of the item size
            return False
        end = int(texts[-1]["start"]) + int(texts[-1]["num_ids"]) if len(texts) else 0
        is_complete = len(texts) == self._num_texts and end == len(ids)
        if not is_complete:
            self._maps = None
        return is_complete

    def ensure(self, reader: SplitReader, encode: Encode, num_workers: int = 1) -> bool:
        """Write the cache unless it is complete; returns whether it is complete now.

        One process writes while the others wait; without file locks, all write the same bytes. With several
        workers, `encode` must be picklable.
        """
        if self.is_complete():
            return True
        if not os.access(self.folder, os.W_OK):
            return False
        try:
            with exclusive_lock_if_supported(self._path("lock")):
                if not self.is_complete():
                    if self._path("texts").exists():
                        logger.warning("rebuilding damaged token cache %s", self._path("ids"))
                    self._write(reader, encode, num_workers)
        except OSError as error:
            logger.warning("cannot write token cache to %s: %s", self.folder, error.strerror)
            return False
        return True

    def find(self, index: int) -> tuple[np.ndarray, int] | None:
        """Ids [n] of a text and its length in UTF-8 bytes; None if the sample has no usable text."""
        texts, ids = self._map()
        start, num_ids, num_bytes = texts[index].item()
        return (ids[start : start + num_ids], num_bytes) if num_ids else None

    def num_ids(self, indices: np.ndarray) -> np.ndarray:
        """Number of ids of each sample, 0 without a usable text: int32 [len(indices)]."""
        return self._map()[0]["num_ids"][indices]

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name}.{suffix}"

    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        if self._maps is None:
            self._maps = _map(self._path("texts"), TEXT), _map(self._path("ids"), self._dtype)
        return self._maps

    def _write(self, reader: SplitReader, encode: Encode, num_workers: int) -> None:
        start = 0
        encode_range = partial(_encode_range, reader, encode, self._dtype)
        # The inner file is renamed first, so `texts` marks the cache as complete.
        with open_atomic(self._path("texts")) as texts, open_atomic(self._path("ids")) as ids:
            for found_ids, found in map_ranges(encode_range, self._num_texts, num_workers):
                found["start"] += start
                ids.write(found_ids.tobytes())
                texts.write(found.tobytes())
                start += len(found_ids)


def _encode_range(
    reader: SplitReader, encode: Encode, dtype: np.dtype, first: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the samples first ... stop - 1, concatenated, and `TEXT` of each, with starts from 0."""
    ids: list[int] = []
    texts = []
    for index in range(first, stop):
        try:
            encoded, num_bytes = encode(reader.read(index))
        except DataError:
            encoded, num_bytes = [], 0
        texts.append((len(ids), len(encoded), num_bytes))
        ids += encoded
    return np.array(ids, dtype=dtype), np.array(texts, dtype=TEXT)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing to map
        return np.empty(0, dtype)
    # A plain array: slicing a memmap is several times slower.
    return np.asarray(np.memmap(path, dtype, mode="r"))
