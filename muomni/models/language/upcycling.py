"""A mixture of experts that begins as the dense model that it is made from.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv:2212.05055): every expert is a copy of the layer's dense
feed-forward and the router begins at random. The scores of the chosen experts are normalized to sum 1,
so the copies together give what the one gave, whichever are chosen. A shared expert adds to that: its last
projection begins at zero, the others at random, so it adds nothing at first and learns from the first
step on. All other weights are those of the dense model.
"""

import torch
from torch import Tensor, nn

from muomni.config.models import ThinkerConfig
from muomni.errors import ConfigError
from muomni.models.layers.moe import MoEBlock

# What may differ: neither changes what the layers compute.
_FREE = {"moe", "intermediate_size", "max_positions"}


def check_upcycling(dense: ThinkerConfig, sparse: ThinkerConfig) -> None:
    """Raise ConfigError, naming the setting, when `sparse` cannot begin as a copy of `dense`."""
    moe = sparse.moe
    if moe is None:
        raise ConfigError(
            "options.upcycle makes experts of a dense Thinker, but the model has none; take a preset "
            "with model.moe (tiny-moe)"
        )
    if dense.moe is not None:
        raise ConfigError(
            "options.upcycle names a Thinker that has experts already; name the run of a dense one"
        )
    if moe.expert_intermediate_size != dense.intermediate_size:
        raise ConfigError(
            f"experts of size {moe.expert_intermediate_size} cannot be copies of a feed-forward of size "
            f"{dense.intermediate_size}; give model.moe.expert_intermediate_size={dense.intermediate_size}"
        )
    if not moe.normalize_top_k:
        raise ConfigError(
            "options.upcycle needs scores that sum to 1; give model.moe.normalize_top_k=true"
        )
    for name in sorted(ThinkerConfig.model_fields.keys() - _FREE):
        has, wants = getattr(dense, name), getattr(sparse, name)
        if has != wants:
            raise ConfigError(
                f"options.upcycle names a Thinker with {name}={has}, but this model has {wants}; give "
                f"model.{name}={has}, or name another run"
            )


@torch.no_grad()
def upcycle(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """Make a new model with mixtures of experts compute what `dense`, a dense model's state, computes.

    Raises KeyError when a tensor is missing; `check_upcycling` sees to it that shapes fit.
    """
    state = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    for name, block in model.named_modules():
        if not isinstance(block, MoEBlock):
            continue
        gate, up, down = (dense[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        block.experts.gate_up_proj.copy_(torch.cat([gate, up]))
        block.experts.down_proj.copy_(down)
        if block.shared_experts is not None:
            nn.init.zeros_(block.shared_experts.get_parameter("down_proj.weight"))
        state |= {f"{name}.{key}": tensor for key, tensor in block.state_dict().items()}
    model.load_state_dict(state)
