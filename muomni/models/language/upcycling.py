"""Sparse upcycling of a dense Thinker to a mixture of experts (Komatsuzaki et al. 2023, arXiv:2212.05055).

Every expert is a copy of the dense feed-forward, and the router is initialized at random. Scores of the
chosen experts sum to 1, so the initial output is that of the dense model. A shared expert starts with a
zero last projection: it adds nothing at first, but learns from the first step. All other weights are
copied.
"""

import torch
from torch import Tensor, nn

from muomni.config.models import ThinkerConfig
from muomni.errors import ConfigError
from muomni.models.layers.moe import MoEBlock

# Settings that may differ.
_FREE = {"moe", "intermediate_size", "max_positions"}


def check_upcycling(dense: ThinkerConfig, sparse: ThinkerConfig) -> None:
    """Raise ConfigError, naming the setting, if `sparse` cannot be initialized from `dense`."""
    moe = sparse.moe
    if moe is None:
        raise ConfigError(
            "options.upcycle needs a model with experts; use a preset with model.moe (tiny-moe)"
        )
    if dense.moe is not None:
        raise ConfigError(
            "options.upcycle names a Thinker that already has experts; name the run of a dense one"
        )
    if moe.expert_intermediate_size != dense.intermediate_size:
        raise ConfigError(
            f"experts of size {moe.expert_intermediate_size} cannot copy a feed-forward of size "
            f"{dense.intermediate_size}; set model.moe.expert_intermediate_size={dense.intermediate_size}"
        )
    if not moe.normalize_top_k:
        raise ConfigError(
            "options.upcycle needs scores that sum to 1; set model.moe.normalize_top_k=true"
        )
    for name in sorted(ThinkerConfig.model_fields.keys() - _FREE):
        has, wants = getattr(dense, name), getattr(sparse, name)
        if has != wants:
            raise ConfigError(
                f"options.upcycle names a Thinker with {name}={has}, but this model has {wants}; set "
                f"model.{name}={has} or name another run"
            )


@torch.no_grad()
def upcycle(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """Initialize a new model with experts from `dense`, the state dict of a dense model.

    `check_upcycling` checks the shapes. Raises KeyError for a missing tensor.
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
