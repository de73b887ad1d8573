"""What a stage with a mixture of experts adds to its loss, to its logs and to the end of a step.

The routers' losses are a term of their own, divided by the real tokens of the whole step: they are
token-weighted means over its micro-batches and ranks. The balance loss multiplies two means over tokens, how
often an expert was chosen and how probable it was. Where both are those of one micro-batch, any split of the
same micro-batches into ranks and accumulation steps gives the same loss. With `balance_over: ranks` the first
is that of all ranks (Qiu et al. 2025, arXiv:2501.11873): without accumulation this is the balance of the whole
step, and micro-batches need not be even each. Taking it from the whole step always would need all of its
forward passes before the first backward pass; taking it from the step before made a small model learn worse. A
bias on the choice does learn from the load of the whole step.

Load is counted over real tokens only (AutoEP's own counter takes padding, too), and is the same for
plain and for expert-parallel layers.
"""

import math
import re

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from muomni.config.models import MoEConfig
from muomni.data.views.base import Batch
from muomni.distributed.collectives import sum_over_ranks
from muomni.models.layers.losses import router_losses
from muomni.models.layers.moe import choice_biases, find_routers
from muomni.training.outputs import StageOutput, Sums

TERM = "router"
_LOAD_STATE = "expert_load"
_LOAD = re.compile(r"moe/layer(\d+)/load\.\d+$")


def find_moe(config: BaseModel) -> MoEConfig | None:
    """The mixture of experts inside a model's sizes (also of a part of it), if there is one."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, MoEConfig):
            return value
        found = find_moe(value) if isinstance(value, BaseModel) else None
        if found is not None:
            return found
    return None


def add_router_term(
    output: StageOutput, moe: MoEConfig, model: nn.Module, logits: list[Tensor], is_real: Tensor
) -> None:
    """Add the routers' loss term, their logs and, where a bias learns from it, the load to `output`.

    `logits` holds the router logits [N, E] of each layer of `model`, `is_real` [...] of N elements is
    False on padding. The term is a sum over real tokens, as `router_denominator` counts them. With
    `balance_over: ranks` all ranks must call it.
    """
    over_ranks = {"sum_counts": sum_over_ranks} if moe.balance_over == "ranks" else {}
    losses = router_losses(
        logits, moe.num_experts_per_token, is_real, choice_biases(model), **over_ranks
    )
    output.losses[TERM] = moe.z_loss_weight * losses.z
    if moe.balance == "loss":
        output.losses[TERM] = output.losses[TERM] + moe.balance_loss_weight * losses.balance
    if moe.balance == "bias":
        output.state[_LOAD_STATE] = losses.load
    output.logs["moe/balance_loss"] = torch.stack([losses.balance.detach(), losses.weight])
    output.logs["moe/z_loss"] = torch.stack([losses.z.detach(), losses.weight])
    for layer, load in enumerate(losses.load):
        output.logs[f"moe/layer{layer}/load"] = torch.stack([load, load.sum().expand_as(load)])


@torch.no_grad()
def update_biases(moe: MoEConfig, model: nn.Module, state: Sums) -> None:
    """Move the biases on the choice of experts by the load of a whole step; every rank must call it.

    `state` is that of the step's outputs, summed over micro-batches. An expert with less than the mean
    load becomes likelier by `bias_update_rate`, one with more less likely (Wang et al. 2024,
    arXiv:2408.15664, algorithm 1).
    """
    if moe.balance != "bias":
        return
    load = sum_over_ranks(state[_LOAD_STATE].clone())
    routers = find_routers(model)
    for router, bias, counts in zip(routers, choice_biases(model), load, strict=True):
        assert bias is not None
        if next(router.parameters()).requires_grad:  # a frozen router routes as it did
            bias += moe.bias_update_rate * (counts.mean() - counts).sign()


def router_denominator(batch: Batch) -> Sums:
    """What the routers' loss term is divided by: the real tokens of a batch with `document_ids`."""
    return {TERM: (batch["document_ids"] > 0).sum().float()}


def load_metrics(ratios: dict[str, float]) -> dict[str, float]:
    """Add metrics of each layer's load, and of all layers, to the shares that its experts got.

    `load/E` is the share of all assignments that expert E got, `max_load` the busiest one's over
    the mean (1 = even), `entropy` that of the shares as a fraction of its maximum, `num_dead` counts
    the experts that no token chose.
    """
    metrics = {name: value for name, value in ratios.items() if not _LOAD.match(name)}
    shares: dict[int, list[float]] = {}
    for name, value in ratios.items():
        if match := _LOAD.match(name):
            shares.setdefault(int(match[1]), []).append(value)
    for layer, load in sorted(shares.items()):
        entropy = -sum(share * math.log(share) for share in load if share > 0)
        of_layer = {f"load/{expert}": share for expert, share in enumerate(load)}
        of_layer["max_load"] = max(load) * len(load)
        of_layer["entropy"] = entropy / max(math.log(len(load)), 1e-9)
        of_layer["num_dead"] = float(sum(share == 0 for share in load))
        metrics |= {f"moe/layer{layer}/{name}": value for name, value in of_layer.items()}
    if shares:
        for name, over_layers in (("max_load", max), ("entropy", min), ("num_dead", sum)):
            metrics[f"moe/{name}"] = over_layers(metrics[f"moe/layer{n}/{name}"] for n in shares)
    return metrics
