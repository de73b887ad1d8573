"""Grouped-query self-attention with RMS norms and rotary positions, by mask, window, or document.

Norms and rotary angles are fp32 whatever the precision of the weights; no buffer holds positions, so
casting a model to half precision cannot change them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from muomni.config.models import MoEConfig, TransformerConfig
from muomni.models.layers.kv_cache import CacheStep, KVCache


@dataclass(frozen=True)
class StackOptions:
    """Variant of a transformer stack, independent of its sizes.

    `rope_theta=None` turns rotary positions off (the model adds learned ones to its input).
    """

    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False
    causal: bool = True
    rope_theta: float | None = 10_000.0
    qk_norm: bool = True
    norm_eps: float = 1e-6
    dropout: float = 0.0
    moe: MoEConfig | None = None
    conv_kernel_size: int = 0  # 0: no convolution between attention and feed-forward


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in fp32."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size] in the dtype of `x`."""
        if not x.is_cpu and x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # one kernel
        wide = x.float()
        mean_square = torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1]
        scale = torch.rsqrt(mean_square + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def make_norm(kind: Literal["rms", "layer"], size: int, eps: float) -> nn.Module:
    """RMSNorm or torch's LayerNorm (which accumulates in fp32 itself)."""
    return RMSNorm(size, eps) if kind == "rms" else nn.LayerNorm(size, eps=eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of RoPE (Su et al. 2021, arXiv:2104.09864), fp32.

    `positions` [B, T] -> two tensors [B, 1, T, head_dim], ready to broadcast over heads. The halves of the
    cosine are equal; those of the sine have opposite signs, as they multiply the other half of a head.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (theta ** (exponents / head_dim))
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, D] in fp32; dimension i is paired with i + D/2, as in the Qwen family."""
    half = x.shape[-1] // 2
    if not x.is_cpu:  # four kernels
        return torch.addcmul(x * cos, x.roll(half, dims=-1), sin).to(x.dtype)
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[..., half:], sin[..., half:]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Apply rotary positions to queries [B, H, T, D] and keys [B, num_kv_heads, T, D].

    Accelerators rotate both in one call, in the layout [B, T, H, D] of their projections.
    """
    if query.is_cpu:
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    both = torch.cat([query.transpose(1, 2), key.transpose(1, 2)], dim=2)
    both = apply_rotary(both, cos.transpose(1, 2), sin.transpose(1, 2)).transpose(1, 2)
    rotated_query, rotated_key = both.split([query.shape[1], key.shape[1]], dim=1)
    return rotated_query, rotated_key


class Documents(NamedTuple):
    """The documents of packed or padded sequences [B, T]; runs of padding are documents too.

    `starts` int32 [N]: offsets of the documents in the flattened batch, strictly ascending, then B * T
    at least once. `longest`: an upper bound on their lengths.
    """

    starts: Tensor
    longest: int


class DropoutKeys(NamedTuple):
    """Keys of `counter_random.keyed_dropout` in a block, which drops units in `channels.shape[0]` places."""

    positions: Tensor  # int32 [B, T]
    channels: Tensor  # int32 [3, D]


class AttentionContext(NamedTuple):
    """State that all layers of one forward pass share, computed once by the stack.

    A named tuple, because wrappers that search a module's inputs for tensors look inside of it.
    """

    mask: Tensor | None  # bool or additive, broadcastable to [B, H, T, S]
    is_causal: bool
    rotary: tuple[Tensor, Tensor] | None
    cache: KVCache | None = None
    step: CacheStep | None = None
    valid: Tensor | None = None  # bool [B, T], for convolutions
    windows: Tensor | None = None  # bool [B * T / W, 1, W, 2 * W], instead of a mask
    documents: Documents | None = None  # instead of a mask, on CUDA devices
    dropout: DropoutKeys | None = None  # those of the layer; None: no dropout


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) through torch's SDPA.

    `num_kv_heads == num_heads` is plain multi-head attention. Optionally, queries and keys are
    RMS-normalized per head before the rotation (QK-norm), as in Qwen3.
    """

    def __init__(self, config: TransformerConfig, options: StackOptions) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        size, bias = config.hidden_size, options.bias
        self.q_proj = nn.Linear(size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, size, bias=bias)
        has_norm = options.qk_norm
        self.q_norm = RMSNorm(self.head_dim, options.norm_eps) if has_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, options.norm_eps) if has_norm else nn.Identity()

    def forward(self, x: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        """[B, T, hidden_size] -> the same; `layer` is this layer's index in the cache."""
        batch, length, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim))
        key = self.k_norm(self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim))
        value = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if context.rotary is not None:
            query, key = rotate(query, key, *context.rotary)
        if context.cache is not None and context.step is not None:
            key, value = context.cache.write(layer, context.step, key, value)
        if context.windows is not None:
            mixed = attend_in_windows(query, key, value, context.windows)
            return self.o_proj(mixed.reshape(batch, length, -1))
        if context.documents is not None:
            mixed = attend_in_documents(query, key, value, context.documents, context.is_causal)
            return self.o_proj(mixed.reshape(batch, length, -1))
        is_grouped = self.num_heads != self.num_kv_heads
        if is_grouped and context.mask is not None and not query.is_cpu:
            # The masked kernels besides cuDNN's do not support grouped heads; the fallback is slow.
            key, value = (repeat_heads(t, self.num_heads) for t in (key, value))
            is_grouped = False
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=context.mask,
            is_causal=context.is_causal,
            enable_gqa=is_grouped,
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


def attend_in_windows(query: Tensor, key: Tensor, value: Tensor, windows: Tensor) -> Tensor:
    """Attend from each window of W positions to itself and the previous one.

    Query, key, and value are [B, H, T, D], `windows` is the mask of `masks.window_mask`; returns
    [B * T / W, W, H, D]. Sequences are concatenated; the mask hides them from each other.
    """
    size = windows.shape[2]
    query, key, value = (
        t.transpose(1, 2).reshape(-1, size, *t.shape[1::2]) for t in (query, key, value)
    )
    key, value = (torch.cat((t.roll(1, dims=0), t), dim=1) for t in (key, value))
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    is_grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=windows, enable_gqa=is_grouped
    )
    return mixed.transpose(1, 2)


def attend_in_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, is_causal: bool
) -> Tensor:
    """Attend within each document by flash kernels: [B, H, T, D] each -> [B * T, H, D].

    Requires a CUDA device and half precision (see `training.attention`).
    """
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    starts, longest = documents
    # A window of the full length selects the flash kernel. For (-1, -1), torch prefers cuDNN, which
    # returns wrong gradients for documents of no length (the pads of `starts`) before version 9.25.
    window = (-1, 0) if is_causal else (longest, longest)
    mixed = varlen_attn(
        query, key, value, starts, starts, longest, longest,
        window_size=window, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(mixed, Tensor)  # a tuple only on request
    return mixed


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each head of keys or values: [B, num_kv_heads, T, D] -> [B, num_heads, T, D]."""
    batch, num_kv_heads, length, size = x.shape
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, length, size)
    return x[:, :, None].expand(shape).reshape(batch, num_heads, length, size)
