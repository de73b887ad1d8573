"""Activation checkpointing: blocks run again in the backward pass instead of keeping their activations.

Chen et al. 2016, arXiv:1604.06174. What is computed does not change: random numbers are drawn again
from the same state. A policy says of which blocks: of none, of all ("full"), of every k-th one, or one of
these by part of the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from muomni.config.loading import did_you_mean
from muomni.config.run import RecomputePolicy
from muomni.errors import ConfigError
from muomni.models.layers.flops import Flops, module_flops


class BlockRunner(nn.Module):
    """Base of the modules whose blocks can be recomputed and compiled: they call them by `run_block`.

    `block_lists` names the lists that hold them.
    """

    recomputed_positions: frozenset[int] = frozenset()
    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)

    def runs(self) -> Iterator[nn.Module]:
        """The blocks, in order."""
        for name in self.block_lists:
            yield from getattr(self, name)

    def block_flops(self, rates: Sequence[int]) -> Flops:
        """FLOPs of all blocks, the i-th of which runs at `rates[i]` positions per unit of work."""
        costs = [module_flops(b, rate) for b, rate in zip(self.runs(), rates, strict=True)]
        recomputed = sum(costs[i].forward for i in self.recomputed_positions)
        return sum(costs, Flops(recomputed=recomputed))

    def run_block(self, place: int, block: nn.Module, *args: Any) -> Any:
        """`block(*args)`, the `place`-th one; its activations are kept unless it is to be recomputed."""
        if place in self.recomputed_positions and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def recompute_every(self, interval: int) -> None:
        """Recompute the first block of each `interval`; 0: no block."""
        places = range(0, len(list(self.runs())), interval) if interval else ()
        self.recomputed_positions = frozenset(places)


def recompute_activations(
    model: nn.Module, policy: RecomputePolicy | Mapping[str, RecomputePolicy] = "full"
) -> None:
    """Turn activation checkpointing on in transformer stacks and codec halves of a stage's model.

    A mapping is by pattern of part names ("thinker", "vision*"); of several that fit a part the first one
    counts, and a part that none fits keeps its activations. Raises ConfigError for a pattern that
    fits nothing.
    """
    parts = {name: part for name, part in model.named_modules() if isinstance(part, BlockRunner)}
    by_part: Mapping[str, RecomputePolicy] = (
        policy if isinstance(policy, Mapping) else {"*": policy}
    )
    for pattern in by_part:
        if not any(_fits(name, pattern) for name in parts):
            known = sorted({name.partition(".")[0] for name in parts})
            raise ConfigError(
                f"training.activation_checkpointing names no part with '{pattern}'"
                f"{did_you_mean(pattern, known)}; parts are {', '.join(known)}"
            )
    for name, part in parts.items():
        fitting = [own for pattern, own in by_part.items() if _fits(name, pattern)]
        part.recompute_every(_interval(fitting[0]) if fitting else 0)


def describe_recomputation(policy: RecomputePolicy | Mapping[str, RecomputePolicy]) -> str:
    """The policy in a few words, none for none."""
    if isinstance(policy, Mapping):
        return "activations recomputed by part"
    interval = _interval(policy)
    which = "" if interval == 1 else f" of one block in {interval}"
    return f"activations{which} recomputed" if interval else ""


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _interval(policy: RecomputePolicy) -> int:
    return {"none": 0, "full": 1}[policy] if isinstance(policy, str) else int(policy)
