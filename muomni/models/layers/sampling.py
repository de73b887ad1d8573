"""Sampling of tokens from logits, and detection of repetition loops."""

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample token ids [...] from logits [..., V].

    `temperature=0` is greedy. `top_k=0` keeps all tokens; `top_p` keeps the smallest set of the most
    probable tokens whose probability reaches it (Holtzman et al. 2019, arXiv:1904.09751). Raises
    ValueError for settings out of range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature} and top_k={top_k} must be at least 0, top_p={top_p} in (0, 1]"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.float() / temperature
    if 0 < top_k < scores.shape[-1]:
        floor = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < floor, float("-inf"))
    probabilities = scores.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        is_out = ordered.cumsum(dim=-1) - ordered >= top_p
        ordered = ordered.masked_fill(is_out, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])


class LoopDetector:
    """Detects repetition loops, which greedy decoding of small models falls into.

    A loop is a cycle of at most `MAX_PERIOD` tokens that occurs at least three times and repeats at
    least `MIN_REPEATED` tokens. Runs on the device without synchronization.
    """

    MAX_PERIOD = 24
    MIN_REPEATED = 8

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._periods = torch.arange(1, self.MAX_PERIOD + 1, device=device)
        self._wanted = (2 * self._periods).clamp_min(self.MIN_REPEATED)
        # Most recent token first; -1: none.
        self._recent = torch.full((batch_size, self.MAX_PERIOD), -1, device=device)
        self._repeated = torch.zeros_like(self._recent)

    def num_repeated(self, token: Tensor) -> Tensor:
        """Add the next token [B, 1]; return how many trailing tokens repeat a cycle [B], 0: no loop."""
        matches = self._recent == token
        self._repeated = (self._repeated + 1) * matches
        self._recent = torch.cat([token, self._recent[:, :-1]], 1)
        return self._repeated.masked_fill(self._repeated < self._wanted, 0).amax(1)
