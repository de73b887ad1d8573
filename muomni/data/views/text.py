"""Texts for next-token prediction, packed into sequences without attention across documents.

Token ids come from the token cache if there is one, otherwise from the texts; batches are the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muomni.data.sampling.lengths import Lengths, evenly_spaced, measured_lengths
from muomni.data.sampling.packing import document_starts, longest_document
from muomni.data.shards.source import Source
from muomni.data.text.sample_texts import sample_text
from muomni.data.text.token_cache import TokenCache
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch, ExampleReader, View

logger = logging.getLogger(__name__)

IGNORE = -100
TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of a document, with BOS and EOS, and its length in UTF-8 bytes."""

    ids: list[int] | np.ndarray
    num_bytes: int


class TextView(View[Document]):
    """Packed sequences: input_ids, labels, document_ids [B, T] with T `seq_len`, document_starts [N]
    (`packing.document_starts`), longest_document (0-d, stays on the host), num_bytes (float, 0-d).

    Inputs of a document are all ids but the last, labels all but the first: EOS is a target, and there is
    no loss across documents. Longer documents are truncated; a warning is logged for training data.
    """

    unit = "tokens"

    def __init__(self, tokenizer: Tokenizer, seq_len: int) -> None:
        self.tokenizer = tokenizer
        self.seq_len = seq_len

    def lengths(self, source: Source, num_workers: int = 1) -> Lengths:
        """Positions of each text, at most `seq_len`; writes missing token caches by `num_workers` processes."""
        depends_on = f"text tokenizer={self.tokenizer.digest}"
        caches = self._caches(source)
        missing = self.cache_tokens(source, num_workers)
        if missing:
            self._warn_of_missing(missing, source.split)
            lengths = measured_lengths(source, self._measure, depends_on, num_workers)
        else:
            lengths = Lengths(
                len(source),
                lambda ids: source.gather(ids, lambda number, own: caches[number].num_ids(own)) - 1,
                depends_on,
            )
        if source.split == TRAIN:
            self._warn_of_truncation(lengths[evenly_spaced(len(lengths))])
        return lengths.clipped(1, self.seq_len)

    def cache_tokens(self, source: Source, num_workers: int = 1) -> list[Path]:
        """Write missing token caches; returns the folders where that is impossible."""
        return [
            cache.folder
            for cache, reader in zip(self._caches(source), source.readers, strict=True)
            if not cache.ensure(reader, self._ids_and_bytes, num_workers)
        ]

    def reader(self, source: Source) -> ExampleReader[Document]:
        """A reader of token ids from the existing caches, and of the other texts from their shards."""
        caches = self._caches(source)
        return _CachedTexts(
            self, source, [cache if cache.is_complete() else None for cache in caches]
        )

    def _caches(self, source: Source) -> list[TokenCache]:
        return [TokenCache(reader, self.tokenizer) for reader in source.readers]

    def _warn_of_missing(self, folders: list[Path], split: str) -> None:
        if split == TRAIN:  # validation calls this repeatedly
            logger.warning(
                "cannot cache token ids in %s; texts are tokenized again in every epoch",
                ", ".join(map(str, folders)),
            )

    def _warn_of_truncation(self, lengths: np.ndarray) -> None:
        is_long = lengths > self.seq_len
        if is_long.any():
            logger.warning(
                "%d of %d training texts are longer than batch.seq_len=%d and lose %d tokens by truncation; "
                "shard them with --document paragraph or line, or raise batch.seq_len",
                is_long.sum(), len(lengths), self.seq_len, (lengths[is_long] - self.seq_len).sum(),
            )  # fmt: skip

    def _measure(self, sample: dict[str, Any]) -> int:
        return len(self._ids_and_bytes(sample)[0]) - 1

    def _ids_and_bytes(self, sample: dict[str, Any]) -> tuple[list[int], int]:
        text = sample_text(sample)
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]
        return ids, len(text.encode())

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Document:
        return self.truncated(Document(*self._ids_and_bytes(sample)))

    def truncated(self, document: Document) -> Document:
        """The document truncated to `seq_len` positions."""
        if len(document.ids) <= self.seq_len + 1:
            return document
        ids = document.ids[: self.seq_len + 1]
        # Bits per byte must not count truncated bytes.
        return Document(ids, len(self.tokenizer.decode(list(ids)).encode()))

    def collate(self, sequences: list[list[Document]]) -> Batch:
        shape = (len(sequences), self.seq_len)
        # numpy fills thousands of short slices several times faster than torch.
        input_ids = np.full(shape, self.tokenizer.pad_id)
        labels = np.full(shape, IGNORE)
        document_ids = np.zeros(shape, dtype=np.int64)
        num_bytes = 0
        for row, documents in enumerate(sequences):
            start = 0
            for number, document in enumerate(documents, start=1):
                end = start + len(document.ids) - 1
                input_ids[row, start:end] = document.ids[:-1]
                labels[row, start:end] = document.ids[1:]
                document_ids[row, start:end] = number
                num_bytes += document.num_bytes
                start = end
        starts = document_starts(document_ids)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "document_ids": torch.from_numpy(document_ids),
            "document_starts": torch.from_numpy(starts),
            "longest_document": torch.tensor(longest_document(starts)),
            "num_bytes": torch.tensor(float(num_bytes)),
            "units": torch.tensor(float((labels != IGNORE).sum())),
        }


class _CachedTexts(ExampleReader[Document]):
    """Reads documents from the token cache of each dataset, or from the shards if it is None."""

    def __init__(self, view: TextView, source: Source, caches: Sequence[TokenCache | None]) -> None:
        super().__init__(view, source)
        self._truncated = view.truncated
        self._caches = caches

    def __call__(self, index: int, random: np.random.Generator | None) -> Document:
        dataset, within = self.source.locate(index)
        cache = self._caches[dataset]
        found = None if cache is None else cache.find(within)
        return (
            super().__call__(index, random) if found is None else self._truncated(Document(*found))
        )

    def expect(self, indices: np.ndarray) -> None:
        is_uncached = np.array([cache is None for cache in self._caches])
        super().expect(indices[is_uncached[self.source.datasets_of(indices)]])
