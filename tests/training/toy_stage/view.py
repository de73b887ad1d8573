"""Texts as bags of tokens."""

from typing import Any

import numpy as np
import torch

from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch, View


class ToyView(View[list[int]]):
    """Batches: tokens [B, L], 0-padded, and num_chars [B], 0 for padding."""

    unit = "tokens"

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def lengths(self, source: Source) -> Lengths:
        return Lengths(len(source), np.ones_like, "one each")

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> list[int]:
        return self.tokenizer.encode(sample["txt"].decode())[: self.max_tokens]

    def collate(self, sequences: list[list[list[int]]]) -> Batch:
        texts = [sequence[0] if sequence else [] for sequence in sequences]
        tokens = torch.zeros(len(texts), self.max_tokens, dtype=torch.long)
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        num_chars = torch.tensor([float(len(self.tokenizer.decode(ids))) for ids in texts])
        return {"tokens": tokens, "num_chars": num_chars, "units": (tokens > 0).sum().float()}
