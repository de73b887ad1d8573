"""Activation checkpointing and compilation of a model's blocks.

Activation checkpointing (Chen et al. 2016, arXiv:1604.06174) recomputes the activations of a block in the
backward pass instead of keeping them. Results do not change: random numbers repeat. A policy chooses
the blocks: none, all ("full"), every k-th, or one of these per part of the model.

torch.compile (Ansel et al. 2024, PyTorch 2) works on single blocks in place: one compilation serves all
layers of a stack, and the names of modules, parameters, and checkpoints stay the same. Code between
blocks (packing, masks, losses) and mixtures of experts, whose shapes depend on the data, run eagerly.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from muomni.config.loading import did_you_mean
from muomni.config.run import RecomputePolicy
from muomni.errors import ConfigError
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.layers.moe import moe_layers

# The stacks of a model share the code of their block. It is compiled once per kind of stack, with and
# without gradient, and once more when a second length turns up.
_MAX_COMPILATIONS = 64


class BlockRunner(nn.Module):
    """Base of modules whose blocks can be recomputed and compiled; they call them by `run_block`.

    `block_lists` names the module lists that hold the blocks.
    """

    recomputed_blocks: frozenset[int] = frozenset()
    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)

    def ordered_blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        return [block for name in self.block_lists for block in getattr(self, name)]

    def block_flops(self, rates: Sequence[int]) -> Flops:
        """FLOPs of all blocks, the i-th of which runs at `rates[i]` positions per unit of work."""
        blocks = zip(self.ordered_blocks(), rates, strict=True)
        costs = [module_flops(block, rate) for block, rate in blocks]
        recomputed = sum(costs[index].forward for index in self.recomputed_blocks)
        return sum(costs, Flops(recomputed=recomputed))

    def run_block(self, index: int, block: nn.Module, *args: Any) -> Any:
        """Return `block(*args)`, keeping its activations unless block `index` is recomputed."""
        if index in self.recomputed_blocks and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def recompute_every(self, interval: int) -> None:
        """Recompute the first block of each `interval`; 0: no block."""
        indices = range(0, len(self.ordered_blocks()), interval) if interval else ()
        self.recomputed_blocks = frozenset(indices)


def recompute_activations(
    model: nn.Module, policy: RecomputePolicy | Mapping[str, RecomputePolicy] = "full"
) -> None:
    """Turn on activation checkpointing in the transformer stacks and codec halves of a model.

    A mapping goes by patterns of part names ("thinker", "vision*"): the first match counts, and a part
    without a match keeps its activations. Raises ConfigError for a pattern without a match.
    """
    parts = {name: part for name, part in model.named_modules() if isinstance(part, BlockRunner)}
    by_part: Mapping[str, RecomputePolicy] = (
        policy if isinstance(policy, Mapping) else {"*": policy}
    )
    if parts or any(_interval(own) for own in by_part.values()):
        for pattern in by_part:
            if not any(_matches(name, pattern) for name in parts):
                known = sorted({name.partition(".")[0] for name in parts})
                raise ConfigError(
                    f"training.activation_checkpointing: no part matches '{pattern}'"
                    f"{did_you_mean(pattern, known)}; parts are {', '.join(known) or 'none'}"
                )
    for name, part in parts.items():
        matching = [own for pattern, own in by_part.items() if _matches(name, pattern)]
        part.recompute_every(_interval(matching[0]) if matching else 0)


def describe_recomputation(policy: RecomputePolicy | Mapping[str, RecomputePolicy]) -> str:
    """Describe the policy in a few words; empty if nothing is recomputed."""
    if isinstance(policy, Mapping):
        return "activations recomputed by part"
    interval = _interval(policy)
    which = "" if interval == 1 else f" of one block in {interval}"
    return f"activations{which} recomputed" if interval else ""


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _interval(policy: RecomputePolicy) -> int:
    return {"none": 0, "full": 1}[policy] if isinstance(policy, str) else int(policy)


def compile_blocks(module: nn.Module, backend: str = "inductor") -> int:
    """Compile the blocks of all transformer stacks and codec halves of `module`; return their number.

    Each compiles at its first call. A size becomes symbolic when it first changes (`dynamic=None`), so
    varying lengths compile twice, and constant ones stay constant.
    """
    torch._dynamo.config.recompile_limit = _MAX_COMPILATIONS
    parts = [part for part in module.modules() if isinstance(part, BlockRunner)]
    blocks = [block for part in parts for block in part.ordered_blocks()]
    for block in blocks:
        for layer in moe_layers(block):
            # The code before and after it is compiled.
            layer.forward = torch.compiler.disable(layer.forward)
        block.compile(backend=backend)
    return len(blocks)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run the body without compiled code: validation and generation have shapes of their own."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def full_precision(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Disable autocast on the device of `x`; a tensor without data (meta device) has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
