"""DeepSpeed AutoEP around the MoE block: completes its JSON section, and gathers full experts from ranks.

AutoEP replaces every `MoEBlock` when the engine starts: each rank of an expert-parallel group keeps
num_experts / autoep_size experts, and tokens travel to them by all-to-all. The user's JSON only turns it on
and sets the group size; names and routing come from the model, so the two cannot disagree. Rank r of a group
holds experts r * n to (r + 1) * n - 1, so gathering in rank order restores their order.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muomni.config.loading import did_you_mean
from muomni.config.models import MoEConfig
from muomni.distributed import collectives
from muomni.errors import ConfigError
from muomni.models.layers.moe import CHOICE_BIAS
from muomni.training.engine import deepspeed_quirks as quirks

SECTION = "expert_parallel"

# Keys that a user may set; the others follow from the model.
USER_KEYS = (
    "enabled", "autoep_size", "use_grouped_mm", "disable_triton_grouped_mm", "combine_impl",
    "gate_up_impl", "row_weighting_impl", "async_split_plan", "comm_backend", "comm_num_sm",
    "comm_qp_margin", "comm_max_tokens_per_rank",
)  # fmt: skip
LAYOUT = {
    "moe_layer_pattern": r"(.*\.)?blocks\.\d+\.mlp",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "score_func": "softmax",
    "score_apply": "post",
}

SHARED_LAYOUT = {"has_shared_experts": True, "shared_experts_pattern": "shared_experts"}


def is_enabled(engine_json: dict[str, Any]) -> bool:
    """Whether the engine JSON asks for expert parallelism; a section without `enabled` does."""
    section = engine_json.get(SECTION)
    return section is not None and bool(section.get("enabled", True))


def complete_section(
    engine_json: dict[str, Any], moe: MoEConfig | None, world_size: int
) -> dict[str, Any]:
    """Complete the `expert_parallel` section of an engine JSON from the model's MoE config.

    `autoep_size` may be "auto": the largest size that divides both experts and ranks. Raises
    ConfigError for a dense model, an unknown key, or a size that does not divide both.
    """
    if SECTION not in engine_json:
        return engine_json
    section = engine_json[SECTION]
    if not isinstance(section, dict):
        raise ConfigError(
            f'{SECTION} must be an object like {{"autoep_size": 2}}, not {section!r}; correct the '
            f"DeepSpeed config"
        )
    for key in section:
        if key not in USER_KEYS:
            owned = key in {**LAYOUT, **SHARED_LAYOUT} or key in ("top_k", "route_norm")
            hint = "; it follows from the model" if owned else did_you_mean(key, USER_KEYS)
            raise ConfigError(f"{SECTION}.{key} cannot be set in the DeepSpeed config{hint}")
    if not is_enabled(engine_json):
        return {key: value for key, value in engine_json.items() if key != SECTION}
    if moe is None:
        raise ConfigError(
            f"the DeepSpeed config has a section '{SECTION}', but the model has no experts; take a "
            f"preset with model.moe (tiny-moe), or remove that section"
        )
    size = _checked_size(section.get("autoep_size", 1), moe.num_experts, world_size)
    shared = moe.shared_intermediate_size is not None
    completed = {
        **section,
        **LAYOUT,
        **(SHARED_LAYOUT if shared else {}),
        "enabled": True,
        "autoep_size": size,
        "top_k": moe.num_experts_per_token,
        "route_norm": moe.normalize_top_k,
    }
    return {**engine_json, SECTION: completed}


def group_size(engine_json: dict[str, Any]) -> int:
    """Ranks that share one set of experts; 0 if every rank runs the plain block."""
    return int(engine_json[SECTION]["autoep_size"]) if is_enabled(engine_json) else 0


def _checked_size(size: Any, num_experts: int, world_size: int) -> int:
    if size == "auto":
        return math.gcd(num_experts, world_size)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"{SECTION}.autoep_size is {size!r}; use a positive number or 'auto'")
    for count, what in ((num_experts, "experts of the model"), (world_size, "ranks")):
        if count % size:
            largest = math.gcd(num_experts, world_size)
            sizes = [str(n) for n in range(1, largest + 1) if largest % n == 0]
            raise ConfigError(
                f"{SECTION}.autoep_size={size} does not divide the {count} {what}; "
                f"sizes that fit here: {', '.join(sizes)}"
            )
    return size


# -- in a running engine -----------------------------------------------------------------------------


def expert_groups(module: nn.Module) -> dict[str, dist.ProcessGroup]:
    """Map the name of each expert parameter to the group of ranks that it is sharded over."""
    return {
        f"{name}.experts.{leaf}": quirks.expert_group(layer)
        for name, layer in module.named_modules()
        if quirks.is_expert_parallel(layer)
        for leaf, _ in layer.get_submodule("experts").named_parameters()
    }


def gather_experts(local: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Gather the local experts [E / n, ...] of each rank of a group into all experts [E, ...] on the CPU."""
    return collectives.gather_rows(local.to(device), group).cpu()


def global_norm(module: nn.Module, gradients: dict[str, Tensor]) -> Tensor:
    """The norm of the gradients by parameter name, in which each expert counts once.

    For the engine with full gradients on every rank (without ZeRO).
    """
    groups = expert_groups(module)
    shared = [gradient for name, gradient in gradients.items() if name not in groups]
    experts = [gradient for name, gradient in gradients.items() if name in groups]
    squares = torch.nn.utils.get_total_norm(experts).square()
    dist.all_reduce(squares, group=next(iter(groups.values())))
    return (torch.nn.utils.get_total_norm(shared).square() + squares).sqrt()


def buffer_owner(module: nn.Module, name: str) -> nn.Module:
    """The module that now holds the buffer `name`: AutoEP moves the choice bias to its router."""
    owner = module.get_submodule(name.rpartition(".")[0])
    is_moved = quirks.is_expert_parallel(owner) and name.endswith(f".{CHOICE_BIAS}")
    return owner.get_submodule("router") if is_moved else owner
