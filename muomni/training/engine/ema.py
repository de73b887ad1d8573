"""The exponential moving average of the trained weights.

It is kept in fp32 of what the optimizer itself updates, so of this rank's share under ZeRO, and costs no
communication. Averaging is elementwise: shares of the average are the average of shares.
"""

from typing import Any

import torch
from torch import Tensor

from muomni.errors import ConfigError


def check_support(engine_json: dict[str, Any]) -> None:
    """Raises ConfigError for an engine that does not keep its fp32 weights where they can be averaged."""
    if "data_types" in engine_json:
        raise ConfigError(
            "training.ema_decay does not run with data_types in the DeepSpeed config; take one of them out"
        )


def decay_at(step: int, decay: float) -> float:
    """The decay at the end of the `step`-th step: it warms up, so that the start is soon forgotten.

    A pure function of the step, as the learning rate is.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """The average of flat or whole fp32 tensors, which are handed in anew at each call."""

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
        """Exchange average and weights; twice leaves both as they were."""
        for average, weight in zip(self.tensors, weights, strict=True):
            kept = average.clone()
            average.copy_(weight)
            weight.data.copy_(kept)

    @torch.no_grad()
    def set(self, tensors: list[Tensor]) -> None:
        """Go on from a saved average, or from the weights themselves."""
        for average, tensor in zip(self.tensors, tensors, strict=True):
            average.copy_(tensor)
