"""16-bit weights without ZeRO: gradients are added up, reduced, and clipped in fp32, beside fp32 weights.

DeepSpeed's own optimizer for this case adds them up in 16 bits, and reads one value per parameter from the
device in each step to look for overflows. Here a step reads one value in fp16, for the loss scale, and none
in bf16.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from muomni.training.engine import deepspeed_quirks as quirks


class UnshardedOptimizer(FP16_UnfusedOptimizer):
    """Updates the fp32 weights from their own gradients, which `Engine` has unscaled and clipped."""

    @classmethod
    def take_over(cls, optimizer: FP16_UnfusedOptimizer) -> None:
        """Turn DeepSpeed's optimizer, whose checkpoints stay the same, into this one."""
        optimizer.__class__ = cls
        assert isinstance(optimizer, cls)
        for short, full in optimizer.pairs():
            short.register_post_accumulate_grad_hook(partial(_move_gradient, full))

    def pairs(self) -> Iterator[tuple[Any, Tensor]]:
        """Each trained weight of the model and its fp32 counterpart."""
        for shorts, fulls in quirks.weight_pairs(self):
            yield from zip(shorts, fulls, strict=True)

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The gradients that the engine reduces: of all ranks, and of each group of expert ranks."""
        shared: list[Tensor] = []
        experts: dict[str, list[Tensor]] = defaultdict(list)
        for short, full in self.pairs():
            if full.grad is None:
                full.grad = torch.zeros_like(full)
            (experts[short.group_name] if is_moe_param(short) else shared).append(full.grad)
        return shared, experts

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the weights, unless `found_inf` of the inner optimizer is set."""
        assert closure is None
        if self.loss_scale_config.use_grad_scaling:
            self.overflow = bool(self.optimizer.found_inf)
            self._update_scale(self.overflow)
        if not self.overflow:
            self.optimizer.step()
            for shorts, fulls in quirks.weight_pairs(self):
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [short.data for short in shorts], [full.data for full in fulls]
                )
        for _, full in self.pairs():
            full.grad = None


def _move_gradient(full: Tensor, short: Tensor) -> None:
    """Add the finished gradient of a weight to that of its fp32 counterpart."""
    assert short.grad is not None
    if full.grad is None:
        full.grad = short.grad.float()
    else:
        full.grad.add_(short.grad)
    short.grad = None
