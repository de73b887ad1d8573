"""Text for next-token prediction: documents packed into rows that cannot see each other."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from muomni.data.lengths import Lengths, spread
from muomni.data.measure import measured_lengths
from muomni.data.source import Source
from muomni.data.tokenizer import Tokenizer
from muomni.data.view import Batch, View
from muomni.errors import DataError

logger = logging.getLogger(__name__)

IGNORE = -100
TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Document:
    """One document as token ids, BOS first and EOS last, and its length in UTF-8 bytes."""

    ids: list[int]
    num_bytes: int


class TextView(View[Document]):
    """Rows of `context` positions; each document's inputs are its ids but the last, its labels
    its ids but the first, so that EOS is learnt and nothing is predicted across documents.

    A document longer than a row is cut to it; of training documents that is told.
    """

    unit = "tokens"

    def __init__(self, tokenizer: Tokenizer, context: int, rows: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.rows = rows

    def lengths(self, source: Source) -> Lengths:
        depends_on = f"text tokenizer={self.tokenizer.digest}"
        lengths = measured_lengths(source, self._measure, depends_on)
        if source.split == TRAIN:
            self._tell_of_cuts(lengths[spread(len(lengths))])
        return lengths.clipped(1, self.context)

    def _tell_of_cuts(self, lengths: np.ndarray) -> None:
        is_long = lengths > self.context
        if is_long.any():
            logger.warning(
                "%d of %d training texts are longer than batch.size=%d; the %d tokens after that are "
                "not trained: shard them with --document paragraph or line, or raise batch.size",
                is_long.sum(), len(lengths), self.context, (lengths[is_long] - self.context).sum(),
            )  # fmt: skip

    def _measure(self, sample: dict[str, Any]) -> int:
        return len(self.tokenizer.encode(_text(sample))) + 1

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Document:
        text = _text(sample)
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]
        if len(ids) > self.context + 1:
            ids = ids[: self.context + 1]
            text = self.tokenizer.decode(ids)  # bits per byte must not count bytes that are cut off
        return Document(ids, len(text.encode()))

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
            "num_bytes": torch.tensor(float(num_bytes)),
            "units": torch.tensor(float((labels != IGNORE).sum())),
        }


def _text(sample: dict[str, Any]) -> str:
    if "txt" not in sample:
        raise DataError(f"sample '{sample['__key__']}' has no .txt member")
    try:
        return sample["txt"].decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"the text of sample '{sample['__key__']}' is not UTF-8") from None
