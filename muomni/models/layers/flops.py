"""Parameters and FLOPs of the language models, by formula from their configs.

A multiplication with its addition counts 2; only matrix products and convolutions count, as in
torch's FlopCounterMode, against which the tests hold every formula. Attention counts all T keys of
a row for each of its T queries, masked or not (the convention of PaLM, arXiv:2204.02311, app. B).
A forward pass is counted by kind of product, since that decides what its training costs: three
times the forward pass where all is trained, less for what is frozen or looks at data. `operator_flops` counts
in the same way what really runs, operator by operator.
"""

from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from muomni.config.models import MoEConfig, TalkerConfig, ThinkerConfig, TransformerConfig
from muomni.models.layers.moe import MoEBlock


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a model: all, those that one token uses, and those in embedding tables."""

    total: int
    active: int
    embedding: int


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """FLOPs of a forward pass, by what its backward pass makes of them.

    `weights`: products of states with weights, `attention`: of states with states, `first`: of data
    with weights, `fixed`: outside of any gradient (mel filters, the search for codes). `again` of
    them all are run a second time where the activations of all blocks are recomputed.
    """

    weights: int = 0
    attention: int = 0
    first: int = 0
    fixed: int = 0
    again: int = 0

    @property
    def total(self) -> int:
        """The forward pass alone."""
        return self.weights + self.attention + self.first + self.fixed

    def training(
        self,
        trained_share: float = 1.0,
        has_trained_input: bool = False,
        recomputed: Fraction = Fraction(0),
    ) -> int:
        """Forward and backward pass, and the `recomputed` share of `again`.

        `trained_share` of the weights get a gradient; states do where there is something to train in
        this part or before it (`has_trained_input`), else a frozen part runs forward only. In a part
        that is trained in part, states get it everywhere.
        """
        if not trained_share and not has_trained_input:
            return self.total
        of_weights = round(trained_share * (self.weights + self.first))
        of_states = self.weights + 2 * self.attention
        return self.total + of_weights + of_states + int(recomputed * self.again)

    def __add__(self, other: "ForwardFlops") -> "ForwardFlops":
        mine, others = astuple(self), astuple(other)
        return ForwardFlops(*(a + b for a, b in zip(mine, others, strict=True)))

    def __mul__(self, number: int) -> "ForwardFlops":
        return ForwardFlops(*(flops * number for flops in astuple(self)))


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model (a meta-device one will do); tied weights count once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    idle = 0
    for module in model.modules():
        if isinstance(module, MoEBlock):
            size = sum(parameter.numel() for parameter in module.experts.parameters())
            idle += size * (module.num_experts - module.top_k) // module.num_experts
    return ParameterCount(total, total - idle, embedding)


def linear_flops(num_inputs: int, num_outputs: int) -> int:
    """One row through a linear layer."""
    return 2 * num_inputs * num_outputs


def attention_projection_flops(config: TransformerConfig) -> int:
    """Query, key, value and output projections of one layer, for one token."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return linear_flops(config.hidden_size, heads * config.head_dim)


def attention_flops(config: TransformerConfig, num_keys: int) -> int:
    """Scores and weighted sum of one layer, for one query over `num_keys` keys."""
    return 2 * linear_flops(config.num_heads * config.head_dim, num_keys)


def mlp_flops(config: TransformerConfig, is_gated: bool, moe: MoEConfig | None = None) -> int:
    """Feed-forward of one layer, for one token; of a mixture, what the token passes and the router."""
    size = config.hidden_size
    if moe is not None:
        passed = moe.num_experts_per_token * moe.expert_intermediate_size
        passed += moe.shared_intermediate_size or 0
        return linear_flops(size, moe.num_experts) + 3 * linear_flops(size, passed)
    return (3 if is_gated else 2) * linear_flops(size, config.intermediate_size)


def stack_flops(
    config: TransformerConfig,
    num_tokens: int,
    *,
    num_keys: int | None = None,
    is_gated: bool = True,
    moe: MoEConfig | None = None,
    dropout: float = 0.0,
) -> ForwardFlops:
    """One row of `num_tokens` through a `TransformerStack`, each over `num_keys` (default: all)."""
    times = num_tokens * config.num_layers
    weights = attention_projection_flops(config) + mlp_flops(config, is_gated, moe)
    attention = attention_flops(config, num_tokens if num_keys is None else num_keys)
    again = weights + attention
    if moe is None and not dropout:
        # Recomputation ends once all inputs are there again; nothing needs the last product's result.
        again -= linear_flops(config.intermediate_size, config.hidden_size)
    return ForwardFlops(weights, attention, again=again) * times


def thinker_flops(
    config: ThinkerConfig, num_tokens: int, num_predicted: int | None = None
) -> ForwardFlops:
    """Forward pass over one row, with the head at `num_predicted` positions (default: all)."""
    head = linear_flops(config.hidden_size, config.vocab_size)
    predicted = num_tokens if num_predicted is None else num_predicted
    return stack_flops(config, num_tokens, moe=config.moe) + ForwardFlops(predicted * head)


def talker_flops(config: TalkerConfig, num_characters: int, num_frames: int) -> ForwardFlops:
    """Teacher-forced pass over one row: characters, start (and speaker) token, frames, all heads."""
    size, num_codes = config.hidden_size, config.codebook_size
    prefix = num_characters + 1 + (config.num_speakers > 0)
    heads = (num_frames + 1) * linear_flops(size, num_codes + 1)
    if config.thinker_hidden_size is not None:
        heads += num_characters * linear_flops(config.thinker_hidden_size, size)
    residual = mlp_flops(config, is_gated=True) + linear_flops(size, num_codes)
    heads += num_frames * (config.num_codebooks - 1) * residual
    stack = stack_flops(config, prefix + num_frames, dropout=config.dropout)
    return stack + ForwardFlops(heads)


def operator_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one operator as a dispatch mode sees it, 0 for what is no product.

    Fused attention counts its two products, backward twice as many: what the kernel computes again to
    save memory is its own affair.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet in _FORWARD_ATTENTION:
        return _attention_products(*args[:3])
    if packet in _BACKWARD_ATTENTION:
        return 2 * _attention_products(*args[1:4])
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _attention_products(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Scores and weighted sum over all keys; [B, H, T, D] each."""
    batch, num_heads, length, size = query.shape
    return batch * num_heads * length * linear_flops(size + value.shape[-1], key.shape[-2])


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
# What scaled_dot_product_attention becomes, forward (q, k, v, ...) and backward (gradient, q, k, v, ...).
_FORWARD_ATTENTION, _BACKWARD_ATTENTION = (
    {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}") for kernel in _KERNELS}
    for suffix in ("", "_backward")
)
