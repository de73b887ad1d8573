"""Keys and values of past tokens, so that generation computes each token once.

A cache is a fixed block of slots. All sequences of a batch write to the same slots, and a bit per slot
marks padding, so left- and right-padded prompts of different lengths decode together, and each sequence
counts its own positions. For inference under `torch.no_grad` only: slots are written in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class CacheStep:
    """Slots, positions, and mask of one forward pass over T new tokens."""

    start: int
    end: int
    positions: Tensor  # [B, T], counting real tokens only
    mask: Tensor | None  # [B, 1, T, end] bool, or None if `is_causal` suffices
    is_causal: bool


class KVCache:
    """Keys and values [num_layers, B, num_kv_heads, max_length, head_dim], filled up to `length`."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.valid = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self.next_position = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.length = 0
        self.max_length = max_length
        self._has_padding = False

    def begin(self, num_new: int, valid: Tensor | None = None) -> CacheStep:
        """Reserve slots for `num_new` tokens per sequence; `valid` [B, num_new] is False on padding.

        Raises ValueError when the cache is full.
        """
        start, end = self.length, self.length + num_new
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, got {end}")
        if valid is None:
            steps = torch.arange(num_new, device=self.valid.device)
            positions = self.next_position[:, None] + steps
            self.valid[:, start:end] = True
            self.next_position = self.next_position + num_new
        else:
            valid = valid.to(torch.bool)
            count = valid.long().cumsum(dim=1)
            positions = (self.next_position[:, None] + count - 1).clamp(min=0)
            self.valid[:, start:end] = valid
            self.next_position = self.next_position + count[:, -1]
            self._has_padding = True
        self.length = end
        mask, is_causal = self._mask(start, end)
        return CacheStep(start, end, positions, mask, is_causal)

    def _mask(self, start: int, end: int) -> tuple[Tensor | None, bool]:
        if not self._has_padding:
            if start == 0:
                return None, True
            if end - start == 1:
                return None, False
        slots = torch.arange(end, device=self.valid.device)
        query = slots[start:, None]
        # A slot always sees itself, so that no softmax is over nothing.
        seen = (slots < query) & self.valid[:, None, :end] | (slots == query)
        return seen[:, None], False

    def write(
        self, layer: int, step: CacheStep, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, num_kv_heads, T, head_dim] of a layer; return all so far."""
        self.keys[layer, :, :, step.start : step.end] = key
        self.values[layer, :, :, step.start : step.end] = value
        return self.keys[layer, :, :, : step.end], self.values[layer, :, :, : step.end]
