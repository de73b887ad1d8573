"""Conversion of `Clip` state dicts to and from open_clip's CLIP.

`to_open_clip` and `from_open_clip` convert the weights; `open_clip_config` holds the matching arguments of
`open_clip.model.CLIP`. open_clip fuses query, key, and value into one matrix and transposes the output
projections. It requires num_heads * head_dim == hidden_size and num_kv_heads == num_heads.
"""

from typing import Any

import torch
from torch import Tensor

from muomni.config.models import ClipConfig, TransformerConfig
from muomni.errors import ConfigError

# (ours, theirs); the first matching prefix applies.
_PREFIXES = (
    ("vision.patch_embedding.", "visual.conv1."),
    ("vision.class_embedding", "visual.class_embedding"),
    ("vision.position_embedding", "visual.positional_embedding"),
    ("vision.input_norm.", "visual.ln_pre."),
    ("vision.stack.final_norm.", "visual.ln_post."),
    ("vision.stack.blocks.", "visual.transformer.resblocks."),
    ("vision_projection.weight", "visual.proj"),
    ("text.token_embedding.", "token_embedding."),
    ("text.position_embedding", "positional_embedding"),
    ("text.stack.final_norm.", "ln_final."),
    ("text.stack.blocks.", "transformer.resblocks."),
    ("text_projection.weight", "text_projection"),
    ("log_scale", "logit_scale"),
    ("bias", "logit_bias"),
)
_BLOCK_PARTS = (
    (".attention_norm.", ".ln_1."),
    (".mlp_norm.", ".ln_2."),
    (".attention.o_proj.", ".attn.out_proj."),
    (".mlp.up_proj.", ".mlp.c_fc."),
    (".mlp.down_proj.", ".mlp.c_proj."),
)
_TRANSPOSED = ("visual.proj", "text_projection")
_SCALARS = ("logit_scale", "logit_bias")
_QKV = ("q_proj", "k_proj", "v_proj")


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of `Clip` to open_clip's CLIP."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in _QKV]
            tensor = torch.cat(parts)
            name = name.replace(".attention.q_proj.", ".attn.in_proj_")
        theirs = _rename(name, _PREFIXES, _BLOCK_PARTS)
        tensor = tensor.T.contiguous() if theirs in _TRANSPOSED else tensor
        renamed[theirs] = tensor[0] if theirs in _SCALARS else tensor
    return renamed


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of open_clip's CLIP to `Clip`, the inverse of `to_open_clip`.

    Raises KeyError for an unknown name.
    """
    prefixes = tuple((theirs, ours) for ours, theirs in _PREFIXES)
    parts = tuple((theirs, ours) for ours, theirs in _BLOCK_PARTS)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = _rename(name, prefixes, parts)
        tensor = tensor.T.contiguous() if name in _TRANSPOSED else tensor
        if ".attn.in_proj_" in ours:
            for part, piece in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[ours.replace(".attn.in_proj_", f".attention.{part}.")] = piece.clone()
        else:
            renamed[ours] = tensor.reshape(1) if name in _SCALARS else tensor
    return renamed


def open_clip_config(config: ClipConfig, eos_id: int) -> dict[str, Any]:
    """Return the keyword arguments of `open_clip.model.CLIP` for this model.

    The text tower pools at token `eos_id`. Raises ConfigError for sizes that open_clip does not support.
    """
    for name, tower in (("vision", config.vision), ("text", config.text)):
        if tower.num_heads * tower.head_dim != tower.hidden_size:
            raise ConfigError(
                f"open_clip requires {name}.num_heads * {name}.head_dim = {name}.hidden_size, got "
                f"{tower.num_heads} * {tower.head_dim} and {tower.hidden_size}"
            )
        if tower.num_heads != tower.num_kv_heads:
            raise ConfigError(
                f"open_clip requires {name}.num_kv_heads = {name}.num_heads = {tower.num_heads}, "
                f"got {tower.num_kv_heads}"
            )
    vision, text = config.vision, config.text
    scalars = {} if config.initial_bias is None else {"init_logit_bias": config.initial_bias}
    return {
        **scalars,
        "embed_dim": config.embedding_size,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.head_dim,
            **_tower_config(vision, vision.norm_eps),
        },
        "text_cfg": {
            "context_length": text.max_positions,
            "vocab_size": text.vocab_size,
            "heads": text.num_heads,
            "pool_type": "eos",
            "eos_id": eos_id,
            **_tower_config(text, text.norm_eps),
        },
    }


def _tower_config(tower: TransformerConfig, norm_eps: float) -> dict[str, Any]:
    return {
        "width": tower.hidden_size,
        "layers": tower.num_layers,
        "mlp_ratio": tower.intermediate_size / tower.hidden_size,
        "norm_kwargs": {"eps": norm_eps},
    }


def _rename(
    name: str, prefixes: tuple[tuple[str, str], ...], parts: tuple[tuple[str, str], ...]
) -> str:
    """Replace the prefix of a name and its parts in a block; raises KeyError for an unknown name."""
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    else:
        raise KeyError(name)
    for old, new in parts:
        name = name.replace(old, new)
    return name
