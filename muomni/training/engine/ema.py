"""Exponential moving average (EMA) of the trained weights.

It is kept in fp32 over the tensors that the optimizer updates, so over this rank's shard under ZeRO, and
needs no communication, since averaging is elementwise.
"""

import torch
from torch import Tensor


def decay_at(step: int, decay: float) -> float:
    """The decay after the `step`-th step, with a warmup that forgets the initial weights quickly.

    A pure function of the step, like the learning rate.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """The average of fp32 tensors, flat or not, which each call passes again."""

    def __init__(self, weights: list[Tensor], decay: float) -> None:
        self._decay = decay
        self.tensors = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, weights: list[Tensor], step: int) -> None:
        """average = decay * average + (1 - decay) * weights, after the `step`-th step."""
        for average, weight in zip(self.tensors, weights, strict=True):
            average.lerp_(weight, 1 - decay_at(step, self._decay))

    @torch.no_grad()
    def swap(self, weights: list[Tensor]) -> None:
        """Exchange average and weights; a second call restores both."""
        for average, weight in zip(self.tensors, weights, strict=True):
            kept = average.clone()
            average.copy_(weight)
            weight.data.copy_(kept)

    @torch.no_grad()
    def set(self, tensors: list[Tensor]) -> None:
        """Replace the average by `tensors`."""
        for average, tensor in zip(self.tensors, tensors, strict=True):
            average.copy_(tensor)
