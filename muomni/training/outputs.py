"""The output of a task module, shared by models, stages, engine, and loop."""

from dataclasses import dataclass, field

import torch

Sums = dict[str, torch.Tensor]


@dataclass  # no slots: ZeRO-3 searches the attributes of a module's output for tensors
class StageOutput:
    """Output of one forward pass of a stage's task module.

    `losses[term]` is a sum (0-d, with gradient) that is divided by `Stage.loss_denominators`. `logs[name]`
    is a detached pair [sum, denominator], summed over micro-batches and ranks before division. `state`
    holds the sums that `Stage.after_step` needs, added up over micro-batches.
    """

    losses: Sums
    logs: Sums = field(default_factory=dict)
    state: Sums = field(default_factory=dict)
