"""Router loss, load metrics, and router biases of stages with a mixture of experts.

The router losses are a separate loss term, divided by the real tokens of the step. The balance loss multiplies
two means over the tokens of a sequence: how often an expert was chosen, and its probability. A sum over
sequences does not depend on ranks and micro-batches, and needs no forward pass over the whole step first, as
means over the global batch would. The bias on the choice does learn from the load of the entire step.

Load counts real tokens only (AutoEP's own counter includes padding), and is the same for plain and for
expert-parallel layers.
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
    """The MoE config inside a model config or one of its parts, if there is one."""
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
    """Add the router loss, its logs, and the load for router biases to `output`.

    `logits` holds the router logits [N, E] of each layer of `model`; `is_real` [B, T], with N elements, is
    False on padding. The term is a sum over the real tokens that `router_denominator` counts.
    """
    losses = router_losses(logits, moe.num_experts_per_token, is_real, choice_biases(model))
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
    """Update the biases on the choice of experts from the load of a step; every rank must call it.

    `state` is summed over micro-batches. The bias of an expert with less than the mean load grows by
    `bias_update_rate`, that of one with more shrinks (Wang et al. 2024, arXiv:2408.15664, algorithm 1).
    """
    if moe.balance != "bias":
        return
    load = sum_over_ranks(state[_LOAD_STATE].clone())
    routers = find_routers(model)
    for router, bias, counts in zip(routers, choice_biases(model), load, strict=True):
        assert bias is not None
        if next(router.parameters()).requires_grad:  # a frozen router keeps its routing
            bias += moe.bias_update_rate * (counts.mean() - counts).sign()


def router_denominator(batch: Batch) -> Sums:
    """Denominator of the router loss: the real tokens of a batch with `document_ids`."""
    return {TERM: (batch["document_ids"] > 0).sum().float()}


def load_metrics(ratios: dict[str, float]) -> dict[str, float]:
    """Replace the load of experts by metrics of each layer and of all layers.

    `load/E` is the fraction of assignments to expert E, `max_load` that of the busiest expert over the mean
    (1 = balanced), `entropy` that of the fractions relative to its maximum, `num_dead` the number of experts
    that no token chose.
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
