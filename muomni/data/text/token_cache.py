"""Token ids of all texts of a split, kept beside the shards: a text is encoded once, not in every epoch.

Two files per split and tokenizer, without a header, little-endian:

    .tokens-DIGEST.ids      the ids of one text after the other: uint16, uint32 above 65,536 pieces
    .tokens-DIGEST.texts    `TEXT` of each sample: where its ids begin, how many there are, UTF-8 bytes

The digest covers samples and tokenizer, so a stale cache is never read, and both files may be deleted at
any time. They are mapped, so that all ranks and workers of a node share their memory.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from muomni.data.shards.reader import SplitReader
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError
from muomni.io.atomic_write import open_atomic
from muomni.io.file_lock import exclusive_lock_if_supported
from muomni.io.hashing import sha256_bytes

logger = logging.getLogger(__name__)

# `num_ids` is 0 for a sample without a usable text: whoever wants it reads the sample and meets the error.
TEXT = np.dtype([("start", "<i8"), ("num_ids", "<i4"), ("num_bytes", "<i4")])

# The ids of one sample's text and its length in UTF-8 bytes; raises DataError where there is none.
Encode = Callable[[dict[str, Any]], tuple[list[int], int]]


class TokenCache:
    """The ids of the texts of one dataset's split. Picklable: files are mapped where first read."""

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

    def is_there(self) -> bool:
        """Whether both files are there and whole."""
        try:
            texts, ids = self._map()
        except (OSError, ValueError):  # the latter for a size that is no multiple of an item's
            return False
        end = int(texts[-1]["start"]) + int(texts[-1]["num_ids"]) if len(texts) else 0
        is_whole = len(texts) == self._num_texts and end == len(ids)
        if not is_whole:
            self._maps = None
        return is_whole

    def make(self, reader: SplitReader, encode: Encode) -> bool:
        """Write the cache unless it is there; returns whether it is now.

        Where processes can lock files one writes and the others wait; elsewhere each writes the same.
        """
        if self.is_there():
            return True
        if not os.access(self.folder, os.W_OK):
            return False
        try:
            with exclusive_lock_if_supported(self._path("lock")):
                if not self.is_there():
                    if self._path("texts").exists():
                        logger.warning("%s is damaged and made again", self._path("ids"))
                    self._write(reader, encode)
        except OSError as error:
            logger.warning("cannot write token ids to %s: %s", self.folder, error.strerror)
            return False
        return True

    def find(self, index: int) -> tuple[np.ndarray, int] | None:
        """Ids [n] of a text and its length in UTF-8 bytes; None for a sample without a usable text."""
        texts, ids = self._map()
        start, num_ids, num_bytes = texts[index].item()
        return (ids[start : start + num_ids], num_bytes) if num_ids else None

    def num_ids(self, indices: np.ndarray) -> np.ndarray:
        """How many ids the texts of the samples have, 0 without a usable text: [len(indices)]."""
        return self._map()[0]["num_ids"][indices]

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name}.{suffix}"

    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        if self._maps is None:
            self._maps = _map(self._path("texts"), TEXT), _map(self._path("ids"), self._dtype)
        return self._maps

    def _write(self, reader: SplitReader, encode: Encode) -> None:
        start = 0
        # Files get their names from the inner one outwards: `texts` says that all is there.
        with open_atomic(self._path("texts")) as texts, open_atomic(self._path("ids")) as ids:
            for index in range(self._num_texts):
                try:
                    encoded, num_bytes = encode(reader.read(index))
                except DataError:
                    encoded, num_bytes = [], 0
                ids.write(np.array(encoded, dtype=self._dtype).tobytes())
                texts.write(np.array((start, len(encoded), num_bytes), dtype=TEXT).tobytes())
                start += len(encoded)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing to map
        return np.empty(0, dtype)
    # As a plain array: slices of a memmap cost several times more.
    return np.asarray(np.memmap(path, dtype, mode="r"))
