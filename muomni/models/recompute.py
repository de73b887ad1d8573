"""Activation checkpointing: blocks run again in the backward pass instead of keeping their activations.

Chen et al. 2016, arXiv:1604.06174. What is computed does not change: random numbers are drawn again
from the same state.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class BlockRunner(nn.Module):
    """Base of the modules whose blocks can be recomputed and compiled: they call them by `run_block`.

    `block_lists` names the lists that hold them.
    """

    is_checkpointing = False
    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)

    def runs(self) -> Iterator[nn.Module]:
        """The blocks, in order."""
        for name in self.block_lists:
            yield from getattr(self, name)

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """`block(*args)`, whose activations are not kept when `is_checkpointing`."""
        if self.is_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def recompute_activations(module: nn.Module) -> None:
    """Turn activation checkpointing on in all transformer stacks and codec halves of `module`."""
    for part in module.modules():
        if isinstance(part, BlockRunner):
            part.is_checkpointing = True
