"""Text for next-token prediction: documents packed into rows that cannot see each other.

Token ids come from the token cache where there is one, else from the texts: batches are the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muomni.data.sampling.lengths import Lengths, spread
from muomni.data.sampling.measure import measured_lengths
from muomni.data.sampling.packing import document_starts
from muomni.data.shards.source import Source
from muomni.data.text.token_cache import TokenCache
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch, ExampleReader, View
from muomni.errors import DataError

logger = logging.getLogger(__name__)

IGNORE = -100
TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Document:
    """One document as token ids, BOS first and EOS last, and its length in UTF-8 bytes."""

    ids: list[int] | np.ndarray
    num_bytes: int


class TextView(View[Document]):
    """Rows of `context` positions; each document's inputs are its ids but the last, its labels
    its ids but the first, so that EOS is learned and nothing is predicted across documents.

    A document longer than a row is cut to it; of training documents that is told.
    """

    unit = "tokens"

    def __init__(self, tokenizer: Tokenizer, context: int, rows: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.rows = rows

    def lengths(self, source: Source) -> Lengths:
        """Positions that each text takes, at most `context`; makes the token caches on the way."""
        depends_on = f"text tokenizer={self.tokenizer.digest}"
        caches = [TokenCache(reader, self.tokenizer) for reader in source.readers]
        missing = [
            cache.folder
            for cache, reader in zip(caches, source.readers, strict=True)
            if not cache.make(reader, self._ids_and_bytes)
        ]
        if missing:
            self._tell_of_missing(missing, source.split)
            lengths = measured_lengths(source, self._measure, depends_on)
        else:
            lengths = Lengths(
                len(source),
                lambda ids: source.gather(ids, lambda number, own: caches[number].num_ids(own)) - 1,
                depends_on,
            )
        if source.split == TRAIN:
            self._tell_of_cuts(lengths[spread(len(lengths))])
        return lengths.clipped(1, self.context)

    def reader(self, source: Source) -> ExampleReader[Document]:
        """Reads token ids from those caches that are there, the other texts from their shards."""
        caches = [TokenCache(reader, self.tokenizer) for reader in source.readers]
        return _CachedTexts(self, source, [cache if cache.is_there() else None for cache in caches])

    def _tell_of_missing(self, folders: list[Path], split: str) -> None:
        if split == TRAIN:  # once a run: validation comes here again and again
            logger.warning(
                "no token ids can be kept in %s: its texts are encoded again in every epoch",
                ", ".join(map(str, folders)),
            )

    def _tell_of_cuts(self, lengths: np.ndarray) -> None:
        is_long = lengths > self.context
        if is_long.any():
            logger.warning(
                "%d of %d training texts are longer than batch.size=%d; the %d tokens after that are "
                "not trained: shard them with --document paragraph or line, or raise batch.size",
                is_long.sum(), len(lengths), self.context, (lengths[is_long] - self.context).sum(),
            )  # fmt: skip

    def _measure(self, sample: dict[str, Any]) -> int:
        return len(self._ids_and_bytes(sample)[0]) - 1

    def _ids_and_bytes(self, sample: dict[str, Any]) -> tuple[list[int], int]:
        text = _text(sample)
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]
        return ids, len(sample["txt"])

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Document:
        return self.cut(Document(*self._ids_and_bytes(sample)))

    def cut(self, document: Document) -> Document:
        """What fits a row of the document."""
        if len(document.ids) <= self.context + 1:
            return document
        ids = document.ids[: self.context + 1]
        # Bits per byte must not count bytes that are cut off.
        return Document(ids, len(self.tokenizer.decode(list(ids)).encode()))

    def collate(self, rows: list[list[Document]]) -> Batch:
        shape = (self.rows, self.context)
        # Filled by numpy, which takes a fraction of torch's time for thousands of short pieces.
        input_ids = np.full(shape, self.tokenizer.pad_id)
        labels = np.full(shape, IGNORE)
        document_ids = np.zeros(shape, dtype=np.int64)
        num_bytes = 0
        for row, documents in enumerate(rows):
            start = 0
            for number, document in enumerate(documents, start=1):
                end = start + len(document.ids) - 1
                input_ids[row, start:end] = document.ids[:-1]
                labels[row, start:end] = document.ids[1:]
                document_ids[row, start:end] = number
                num_bytes += document.num_bytes
                start = end
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "document_ids": torch.from_numpy(document_ids),
            "document_starts": torch.from_numpy(document_starts(document_ids)),
            "num_bytes": torch.tensor(float(num_bytes)),
            "units": torch.tensor(float((labels != IGNORE).sum())),
        }


class _CachedTexts(ExampleReader[Document]):
    """Documents from the token cache of each dataset (None: it has none), else from their shards."""

    def __init__(self, view: TextView, source: Source, caches: Sequence[TokenCache | None]) -> None:
        super().__init__(view, source)
        self._cut = view.cut
        self._caches = caches

    def __call__(self, index: int, random: np.random.Generator | None) -> Document:
        dataset, within = self.source.locate(index)
        cache = self._caches[dataset]
        found = None if cache is None else cache.find(within)
        return super().__call__(index, random) if found is None else self._cut(Document(*found))

    def expect(self, indices: np.ndarray) -> None:
        has_none = np.array([cache is None for cache in self._caches])
        super().expect(indices[has_none[self.source.datasets_of(indices)]])


def _text(sample: dict[str, Any]) -> str:
    if "txt" not in sample:
        raise DataError(f"sample '{sample['__key__']}' has no .txt member")
    try:
        return sample["txt"].decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"the text of sample '{sample['__key__']}' is not UTF-8") from None
