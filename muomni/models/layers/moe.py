"""Mixture-of-experts feed-forward in plain PyTorch, laid out for DeepSpeed AutoEP to take over.

The block is `gate: Linear(d, E)` and `experts` with `gate_up_proj` [E, 2f, d], `down_proj` [E, d, f]
(Qwen3-MoE; Fedus et al. 2021, arXiv:2101.03961 for softmax top-k routing). No token is dropped. Beside
them stand, when the config asks for it, one feed-forward that every token passes (`shared_experts`) and
a bias that steers the choice of experts without a gradient (`e_score_correction_bias`; Wang et al.
2024, arXiv:2408.15664). Both names are the ones that AutoEP looks for.
Called as `block(x [B, T, d]) -> [B, T, d]`, which is all that AutoEP's replacement promises too.

Router logits [B*T, E] leave the block only as the output of its router linear: a forward hook on
it (`record_router_logits`) sees them under the names of this file and of AutoEP alike, so balance
losses work on both.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import MoEConfig

# Where the router linear lives in our block, and in the layer that AutoEP puts in its place.
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

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Tokens sorted by expert [N, d] -> [N, d]; `counts[e]` rows belong to expert e."""
        # unbind, not indexing: its gradient is one stack instead of a full-size tensor per expert.
        gate_ups, downs = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        outputs = []
        for rows, gate_up, down in zip(x.split(counts), gate_ups, downs, strict=True):
            gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outputs)


class MoEBlock(nn.Module):
    """Softmax top-k routing over `Experts`; the scores are computed in fp32.

    `tokens_per_expert` [E] counts the assignments since it was last zeroed (AutoEP's layer has a
    buffer of the same name and meaning). What `shared_experts` [..., d] -> [..., d] gives is added to
    the output of the routed experts.
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
        # Integer, so that casting the model to half precision leaves the counts exact.
        counts = torch.zeros(config.num_experts, dtype=torch.long)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        tokens = x.reshape(-1, x.shape[-1])
        bias = self.e_score_correction_bias
        scores, chosen = route(self.gate(tokens), self.top_k, self.normalize_top_k, bias)
        flat = chosen.reshape(-1)
        counts = torch.bincount(flat, minlength=self.num_experts)
        with torch.no_grad():
            self.tokens_per_expert += counts
        order = flat.argsort(stable=True)
        # index_select, not indexing: on CPUs its gradient adds whole rows, the other's single numbers.
        rows = tokens.index_select(0, order // self.top_k)
        outputs = self.experts(rows, counts.tolist())
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        outputs = outputs.index_select(0, inverse).view(*chosen.shape, x.shape[-1])
        mixed = (outputs * scores.to(outputs.dtype)[..., None]).sum(dim=1).view_as(x)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


def route(
    logits: Tensor, top_k: int, normalize: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Router logits [N, E] -> fp32 scores [N, top_k] and expert numbers [N, top_k].

    `bias` [E] is added to the scores for the choice alone: the scores returned are without it.
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


def moe_layers(model: nn.Module) -> list[nn.Module]:
    """All MoE layers in order, `MoEBlock` or what AutoEP put in its place."""
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module)]


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The router linears of all MoE layers in order, before or after AutoEP replaced the blocks."""
    named = dict(model.named_modules())
    layers = [name for name in named if f"{name}.experts" in named]
    return [
        named[f"{name}.{path}"]
        for name in layers
        for path in ROUTER_PATHS
        if f"{name}.{path}" in named
    ]


def choice_biases(model: nn.Module) -> list[Tensor | None]:
    """The bias [E] on the choice of each MoE layer in order, before or after AutoEP; None where none is."""
    named = dict(model.named_modules())
    layers = [name for name in named if f"{name}.experts" in named]
    return [getattr(named.get(f"{name}.router", named[name]), CHOICE_BIAS, None) for name in layers]


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router logits [N, E] of every forward inside the block, one tensor per MoE layer.

    The list is in layer order for one forward; clear it between forwards. Leave the block before the
    backward pass: routers that run again there, to recompute activations, are not recorded then.
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
    """Rename a state dict with all experts in it from AutoEP's layers back to `MoEBlock`.

    AutoEP keeps gate and up projections apart (`w1`, `w3` [E, f, d]), down is `w2` [E, d, f].
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
