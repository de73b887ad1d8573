"""torch.compile of single blocks, in place: names of modules, parameters and checkpoints stay as they are.

A block is the unit that repeats, so one compilation serves all layers of a stack, and what is between
blocks (packing, masks, losses) stays as it is, and so do mixtures of experts inside of them, whose shapes
depend on the data. Ansel et al. 2024, PyTorch 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from muomni.models.layers.moe import moe_layers
from muomni.models.layers.recompute import BlockRunner

# All stacks of a model share the code of their block, which is compiled anew for each kind of stack, with
# and without gradient, and once more when a second length turns up.
_MAX_COMPILATIONS = 64


def compile_blocks(module: nn.Module, backend: str = "inductor") -> int:
    """Compile the blocks of all transformer stacks and codec halves of `module`; returns how many.

    It happens at the first call of each. Sizes that change from call to call become symbols at their first
    change (`dynamic=None`), so lengths in buckets are compiled twice and rows of one length stay constant.
    """
    torch._dynamo.config.recompile_limit = _MAX_COMPILATIONS
    blocks = [b for part in module.modules() if isinstance(part, BlockRunner) for b in part.runs()]
    for block in blocks:
        for layer in moe_layers(block):
            # What is before and behind it is compiled.
            layer.forward = torch.compiler.disable(layer.forward)
        block.compile(backend=backend)
    return len(blocks)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run the block without compiled code: validation and generation have shapes of their own."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")
