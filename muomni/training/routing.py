"""What a stage with a mixture of experts adds to its loss and to its logs.

The router's losses are folded into the language-model term, times that term's own weight: divided by
the global weight of a step they become a token-weighted mean over micro-batches, whatever the number
of ranks and of accumulation steps. Expert load is counted over real tokens only (AutoEP's own counter
takes padding, too), and is the same for plain and for expert-parallel layers.
"""

import math
import re

import torch
from pydantic import BaseModel
from torch import Tensor

from muomni.config.models import MoEConfig
from muomni.models.losses import router_losses

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


def router_term(
    logits: list[Tensor], moe: MoEConfig, is_real: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Balance and z-loss as a sum that may be added to a term of this `weight` (0-d), and logs.

    `logits` holds the router logits [N, E] of each layer, `is_real` [...] of N elements is False on
    padding. Logs are [sum, weight] pairs; the load's sums are a vector over experts.
    """
    router = router_losses(logits, moe.num_experts_per_token, is_real)
    per_token = moe.balance_loss_weight * router.balance + moe.z_loss_weight * router.z
    logs = {
        "moe/balance_loss": torch.stack([router.balance.detach(), router.weight]),
        "moe/z_loss": torch.stack([router.z.detach(), router.weight]),
    }
    for layer, load in enumerate(router.load):
        logs[f"moe/layer{layer}/load"] = torch.stack([load, load.sum().expand_as(load)])
    return per_token / router.weight.clamp(min=1) * weight, logs


def load_figures(ratios: dict[str, float]) -> dict[str, float]:
    """Replace each layer's shares of the load by a few figures, and add two over all layers.

    `max_load` is the busiest expert's load over the mean one (1 = even), `entropy` that of the
    shares as a fraction of its maximum, `num_dead` the experts that no token chose.
    """
    figures = {name: value for name, value in ratios.items() if not _LOAD.match(name)}
    shares: dict[int, list[float]] = {}
    for name, value in ratios.items():
        if match := _LOAD.match(name):
            shares.setdefault(int(match[1]), []).append(value)
    for layer, load in sorted(shares.items()):
        entropy = -sum(share * math.log(share) for share in load if share > 0)
        figures[f"moe/layer{layer}/max_load"] = max(load) * len(load)
        figures[f"moe/layer{layer}/entropy"] = entropy / max(math.log(len(load)), 1e-9)
        figures[f"moe/layer{layer}/num_dead"] = float(sum(share == 0 for share in load))
    if shares:
        layers = list(shares)
        figures["moe/max_load"] = max(figures[f"moe/layer{layer}/max_load"] for layer in layers)
        figures["moe/num_dead"] = sum(figures[f"moe/layer{layer}/num_dead"] for layer in layers)
    return figures
