"""Conversion of Thinker state dicts to and from Qwen3 and Qwen3Moe of transformers.

`to_qwen3` and `from_qwen3` rename the weights, which are equal; `qwen3_config` is the matching
`config.json`. Expert weights stay stacked, as `Qwen3MoeForCausalLM.load_state_dict` expects.
"""

from typing import Any

from torch import Tensor

from muomni.config.models import ThinkerConfig
from muomni.errors import ConfigError

# (ours, theirs); a longer name precedes one that it contains.
_PARTS = (
    ("embed_tokens.", "model.embed_tokens."),
    ("stack.final_norm.", "model.norm."),
    ("stack.blocks.", "model.layers."),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
)


def to_qwen3(state: dict[str, Tensor], config: ThinkerConfig) -> dict[str, Tensor]:
    """Convert a Thinker's state dict to transformers' names, including a tied head.

    Raises ConfigError for shared experts and routing biases, which Qwen3Moe does not have.
    """
    _check_mixture(config)
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in _PARTS:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    if config.tie_embeddings:
        renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    return renamed


def _check_mixture(config: ThinkerConfig) -> None:
    moe = config.moe
    if moe is not None and (moe.shared_intermediate_size is not None or moe.balance == "bias"):
        raise ConfigError(
            "Qwen3Moe has no shared expert and no routing bias; to convert a Thinker, train it without "
            "model.moe.shared_intermediate_size and model.moe.balance=bias"
        )


def from_qwen3(state: dict[str, Tensor], config: ThinkerConfig) -> dict[str, Tensor]:
    """Convert a state dict of transformers to the Thinker's names, the inverse of `to_qwen3`."""
    renamed = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        for ours, theirs in _PARTS:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def qwen3_config(config: ThinkerConfig) -> dict[str, Any]:
    """The `config.json` of transformers with which the converted weights load.

    Raises ConfigError as `to_qwen3` does.
    """
    _check_mixture(config)
    values: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    if config.moe is not None:
        values |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.num_experts_per_token,
            "moe_intermediate_size": config.moe.expert_intermediate_size,
            "norm_topk_prob": config.moe.normalize_top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return values
