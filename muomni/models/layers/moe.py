"""Mixture-of-experts feed-forward in plain PyTorch, in the layout that DeepSpeed AutoEP replaces.

The block has `gate: Linear(d, E)` and `experts` with `gate_up_proj` [E, 2f, d], `down_proj` [E, d, f]
(as Qwen3-MoE; softmax top-k routing after Fedus et al. 2021, arXiv:2101.03961). No token is dropped.
Optional are a feed-forward for every token (`shared_experts`) and a routing bias without a gradient
(`e_score_correction_bias`; Wang et al. 2024, arXiv:2408.15664), both named as AutoEP expects. The block
maps [B, T, d] to [B, T, d], as does AutoEP's replacement.

Router logits [B * T, E] are the output of the router linear. `record_router_logits` reads them with a
forward hook, in this block and in AutoEP's, so balance losses work on both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import MoEConfig

# Path of the router linear in `MoEBlock` and in AutoEP's replacement.
ROUTER_PATHS = ("gate", "router.gate")
CHOICE_BIAS = "e_score_correction_bias"


class Experts(nn.Module):
    """E SwiGLU feed-forwards whose weights are stacked in two tensors."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=intermediate_size**-0.5)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Tokens sorted by expert [N, d] -> [N, d]; `counts[e]` (int64 [E]) of them belong to expert e."""
        if self._has_grouped_kernels(x):
            return self.grouped(x, counts)
        # unbind, not indexing: its gradient is one stack instead of a full-size tensor per expert.
        gate_ups, downs = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        outputs = []
        # Reads the counts, which synchronizes an accelerator.
        parts = x.split(counts.tolist())
        for tokens, gate_up, down in zip(parts, gate_ups, downs, strict=True):
            gate, up = F.linear(tokens, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outputs)

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """As `forward`, by two grouped matmuls whose groups the device reads."""
        ends = counts.cumsum(0).to(torch.int32)
        hidden = F.grouped_mm(x, self.gate_up_proj.transpose(1, 2), offs=ends)
        gate, up = hidden.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)

    def _has_grouped_kernels(self, x: Tensor) -> bool:
        """Whether `grouped_mm` runs as one kernel; otherwise it is a loop that reads the counts, too.

        Its rows must be aligned to 16 bytes.
        """
        _, hidden_size, size = self.down_proj.shape
        is_aligned = hidden_size % 8 == 0 and size % 8 == 0
        return is_aligned and x.dtype == torch.bfloat16 and _is_hopper(x.device)


class MoEBlock(nn.Module):
    """Softmax top-k routing over `Experts`, with scores in fp32.

    `tokens_per_expert` [E] counts assignments since it was last zeroed, as in AutoEP's layer. The output
    of `shared_experts` [..., d] -> [..., d] is added to that of the routed experts.
    """

    tokens_per_expert: Tensor
    e_score_correction_bias: Tensor | None

    def __init__(
        self, hidden_size: int, config: MoEConfig, shared_experts: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_token
        self.normalize_top_k = config.normalize_top_k
        self.gate = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, hidden_size, config.expert_intermediate_size)
        self.shared_experts = shared_experts
        bias = torch.zeros(config.num_experts) if config.balance == "bias" else None
        self.register_buffer(CHOICE_BIAS, bias)
        # Integers stay exact when the model is cast to half precision.
        counts = torch.zeros(config.num_experts, dtype=torch.long)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        tokens = x.reshape(-1, x.shape[-1])
        bias = self.e_score_correction_bias
        scores, chosen = route(self.gate(tokens), self.top_k, self.normalize_top_k, bias)
        flat = chosen.reshape(-1)
        counts = count_per_expert(flat, self.num_experts)
        with torch.no_grad():
            self.tokens_per_expert += counts
        order = flat.argsort(stable=True)
        # index_select, not indexing: on CPUs its gradient adds vectors instead of single elements.
        routed = tokens.index_select(0, order // self.top_k)
        outputs = self.experts(routed, counts)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        outputs = outputs.index_select(0, inverse).view(*chosen.shape, x.shape[-1])
        mixed = (outputs * scores.to(outputs.dtype)[..., None]).sum(dim=1).view_as(x)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


def route(
    logits: Tensor, top_k: int, normalize: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Router logits [N, E] -> fp32 scores [N, top_k] and expert indices [N, top_k].

    `bias` [E] affects the choice of experts only, not the returned scores.
    """
    scores = logits.float().softmax(dim=-1)
    if bias is None:
        scores, chosen = torch.topk(scores, top_k, dim=-1)
    else:
        chosen = torch.topk(scores + bias, top_k, dim=-1).indices
        scores = scores.gather(-1, chosen)
    if normalize:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores, chosen


def count_per_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """Count the occurrences of each expert in `chosen` (int64): int64 [num_experts]."""
    if chosen.is_cpu:
        return torch.bincount(chosen, minlength=num_experts)
    # bincount reads the largest value, which synchronizes an accelerator.
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def moe_layers(model: nn.Module) -> list[nn.Module]:
    """All MoE layers in order: `MoEBlock` or AutoEP's replacement."""
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module)]


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The router linears of all MoE layers in order, with or without AutoEP."""
    named = dict(model.named_modules())
    layers = [name for name in named if f"{name}.experts" in named]
    return [
        named[f"{name}.{path}"]
        for name in layers
        for path in ROUTER_PATHS
        if f"{name}.{path}" in named
    ]


def choice_biases(model: nn.Module) -> list[Tensor | None]:
    """The routing bias [E] of each MoE layer in order, or None, with or without AutoEP."""
    named = dict(model.named_modules())
    layers = [name for name in named if f"{name}.experts" in named]
    return [getattr(named.get(f"{name}.router", named[name]), CHOICE_BIAS, None) for name in layers]


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router logits [N, E] of each MoE layer in every forward pass inside the context.

    They are in layer order; clear the list between passes. Exit the context before the backward pass,
    or routers that are recomputed there are recorded twice.
    """
    recorded: list[Tensor] = []

    def record(_router: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        recorded.append(output)

    hooks = [router.register_forward_hook(record) for router in find_routers(model)]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def from_autoep(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict that holds all experts from AutoEP's layers back to `MoEBlock`.

    AutoEP splits gate and up projections (`w1`, `w3` [E, f, d]); down is `w2` [E, d, f].
    """
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(".experts.w1"):
            stem = name.removesuffix("w1")
            renamed[f"{stem}gate_up_proj"] = torch.cat([tensor, state[f"{stem}w3"]], dim=1)
        elif name.endswith(".experts.w2"):
            renamed[f"{name.removesuffix('w2')}down_proj"] = tensor
        elif not name.endswith(".experts.w3"):
            renamed[name.replace(".router.", ".")] = tensor
    return renamed
