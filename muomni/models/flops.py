"""Parameters and forward FLOPs of the language models, by formula from their configs.

A multiplication with its addition counts 2; only matrix products and convolutions count, as in
torch's FlopCounterMode, against which the tests hold every formula. Attention counts all T keys of
a row for each of its T queries, masked or not (the convention of PaLM, arXiv:2204.02311, app. B).
Training costs three times the forward pass, a fourth one when activations are recomputed.
"""

from dataclasses import dataclass

from torch import nn

from muomni.config.models import MoEConfig, TalkerConfig, ThinkerConfig, TransformerConfig
from muomni.models.moe import MoEBlock


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a model: all, those that one token uses, and those in embedding tables."""

    total: int
    active: int
    embedding: int


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
) -> int:
    """One row of `num_tokens` through a `TransformerStack`, each over `num_keys` (default: all)."""
    layer = (
        attention_projection_flops(config)
        + attention_flops(config, num_tokens if num_keys is None else num_keys)
        + mlp_flops(config, is_gated, moe)
    )
    return num_tokens * config.num_layers * layer


def thinker_flops(config: ThinkerConfig, num_tokens: int, num_predicted: int | None = None) -> int:
    """Forward pass over one row, with the head at `num_predicted` positions (default: all)."""
    head = linear_flops(config.hidden_size, config.vocab_size)
    predicted = num_tokens if num_predicted is None else num_predicted
    return stack_flops(config, num_tokens, moe=config.moe) + predicted * head


def talker_flops(config: TalkerConfig, num_letters: int, num_frames: int) -> int:
    """Teacher-forced pass over one row: letters, start (and speaker) token, frames, all heads."""
    size, num_codes = config.hidden_size, config.codebook_size
    prefix = num_letters + 1 + (config.num_speakers > 0)
    total = stack_flops(config, prefix + num_frames)
    if config.thinker_hidden_size is not None:
        total += num_letters * linear_flops(config.thinker_hidden_size, size)
    residual = mlp_flops(config, is_gated=True) + linear_flops(size, num_codes)
    total += (num_frames + 1) * linear_flops(size, num_codes + 1)
    return total + num_frames * (config.num_codebooks - 1) * residual


def training_flops(forward_flops: int, recomputes_activations: bool = False) -> int:
    """Forward and backward pass, given the forward pass."""
    return forward_flops * (4 if recomputes_activations else 3)
