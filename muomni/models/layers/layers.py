"""The one transformer of muomni: norms, rotary positions, attention, feed-forwards, blocks, stack.

Thinker, Talker, audio encoder, vision tower and text tower are all a `TransformerStack` with other
`StackOptions`. Norms, rotary angles and router scores are fp32 whatever the weights' precision is;
positions live in no buffer, so casting a model to half precision cannot harm them.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from muomni.config.models import MoEConfig, TransformerConfig
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.layers.kv_cache import CacheStep, KVCache
from muomni.models.layers.moe import Experts, MoEBlock
from muomni.models.layers.recompute import BlockRunner

INIT_STD = 0.02


@dataclass(frozen=True)
class StackOptions:
    """What distinguishes one stack from another, beside its sizes.

    `rope_theta=None` means no rotary positions (the model adds learned ones to its input).
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
        wide = x.float()
        mean_square = torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1]
        scale = torch.rsqrt(mean_square + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def make_norm(kind: Literal["rms", "layer"], size: int, eps: float) -> nn.Module:
    """RMSNorm or torch's LayerNorm (which accumulates in fp32 itself)."""
    return RMSNorm(size, eps) if kind == "rms" else nn.LayerNorm(size, eps=eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of RoPE (Su et al. 2021, arXiv:2104.09864), fp32.

    `positions` [B, T] -> two tensors [B, 1, T, head_dim / 2], ready to broadcast over heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (theta ** (exponents / head_dim))
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, D] in fp32; dimension i is paired with i + D/2, as in the Qwen family."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """Plain feed-forward with the exact (erf) GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class ConvModule(nn.Module):
    """Gated depthwise convolution over time, the local half of a Conformer block.

    After Gulati et al. 2020, arXiv:2005.08100, with RMSNorm in place of batch norm, so that neither the
    other rows of a batch nor other ranks matter.
    """

    def __init__(self, hidden_size: int, kernel_size: int, norm_eps: float) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.depthwise = nn.Conv1d(
            hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.down_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """[B, T, hidden_size] -> the same; what `valid` [B, T] marks as padding is read as zeros."""
        x = F.glu(self.up_proj(x), dim=-1)
        if valid is not None:
            x = x * valid[:, :, None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.down_proj(F.silu(self.norm(x)))


class Documents(NamedTuple):
    """The documents of packed or padded rows [B, T]; each position is in one, since padding forms some, too.

    `starts` int32 [N]: where they begin in the rows laid end to end, ascending; what comes behind the last
    document is B * T, once or more. `longest`: no document has more positions.
    """

    starts: Tensor
    longest: int


class AttentionContext(NamedTuple):
    """Everything that all layers of one forward share, computed once by the stack.

    A named tuple, because wrappers that look for tensors among a module's inputs see into those.
    """

    mask: Tensor | None  # bool or additive, broadcastable to [B, H, T, S]
    is_causal: bool
    rotary: tuple[Tensor, Tensor] | None
    cache: KVCache | None = None
    step: CacheStep | None = None
    valid: Tensor | None = None  # bool [B, T], for convolutions
    windows: Tensor | None = None  # bool [B * T / W, 1, W, 2 * W], in place of a mask
    documents: Documents | None = None  # in place of a mask, on CUDA devices


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) through torch's SDPA.

    `num_kv_heads == num_heads` is ordinary multi-head attention. Queries and keys are optionally
    RMS-normalized per head before the rotation (QK-norm), as Qwen3 does.
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
        """[B, T, hidden_size] -> the same; `layer` names this layer's part of the cache."""
        batch, length, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim))
        key = self.k_norm(self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim))
        value = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if context.rotary is not None:
            query = apply_rotary(query, *context.rotary)
            key = apply_rotary(key, *context.rotary)
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
            # CUDA's masked kernels know no grouped heads and would fall back to the slow one.
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
    """Attention of [B, H, T, D] within windows of W positions and the ones before: [B * T / W, W, H, D].

    `windows` is the mask of `masks.window_mask`. Rows are taken as one: the mask never looks beyond them.
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
    """Attention of [B, H, T, D] within each document, by flash kernels: [B * T, H, D].

    CUDA devices only, in half precision (`training.attention` says where).
    """
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    starts, longest = documents
    mixed = varlen_attn(
        query, key, value, starts, starts, longest, longest,
        window_size=(-1, 0 if is_causal else -1), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(mixed, Tensor)  # a pair only where more is asked for
    return mixed


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values [B, num_kv_heads, T, D] -> [B, num_heads, T, D], each head in a row."""
    batch, num_kv_heads, length, size = x.shape
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, length, size)
    return x[:, :, None].expand(shape).reshape(batch, num_heads, length, size)


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), perhaps a convolution, then x + feed-forward(norm(x))."""

    def __init__(self, config: TransformerConfig, options: StackOptions) -> None:
        super().__init__()
        self.attention_norm = make_norm(options.norm, config.hidden_size, options.norm_eps)
        self.attention = Attention(config, options)
        self.conv: ConvModule | None = None
        if options.conv_kernel_size:
            self.conv_norm = make_norm(options.norm, config.hidden_size, options.norm_eps)
            self.conv = ConvModule(config.hidden_size, options.conv_kernel_size, options.norm_eps)
        self.mlp_norm = make_norm(options.norm, config.hidden_size, options.norm_eps)
        self.mlp = _make_mlp(config, options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        """[B, T, hidden_size] -> [B, T, hidden_size]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), context, layer))
        if self.conv is not None:
            x = x + self.dropout(self.conv(self.conv_norm(x), context.valid))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def _make_mlp(config: TransformerConfig, options: StackOptions) -> nn.Module:
    if options.moe is not None:
        shared_size = options.moe.shared_intermediate_size
        shared = None if shared_size is None else SwiGLU(config.hidden_size, shared_size)
        return MoEBlock(config.hidden_size, options.moe, shared)
    if options.mlp == "swiglu":
        return SwiGLU(config.hidden_size, config.intermediate_size, options.bias)
    return GeluMLP(config.hidden_size, config.intermediate_size, options.bias)


class TransformerStack(BlockRunner):
    """Blocks and a final norm; serves causal and bidirectional models alike.

    `attends_by_documents` asks the model around it to give `documents` in place of masks.
    """

    def __init__(self, config: TransformerConfig, options: StackOptions) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.attends_by_documents = False
        self.blocks = nn.ModuleList(
            TransformerBlock(config, options) for _ in range(config.num_layers)
        )
        self.final_norm = make_norm(options.norm, config.hidden_size, options.norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        valid: Tensor | None = None,
        windows: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Embeddings [B, T, hidden_size] -> normed states of the same shape.

        `positions` [B, T] default to 0..T-1, or with a cache to the count of real tokens so far.
        `mask` (bool, True = may look, or additive) is broadcastable to [B, H, T, T] and complete: a
        causal stack given a mask adds no causality. With a cache the mask is the cache's own, and
        `valid` [B, T] marks the real tokens among the new ones; without, it tells a stack with
        convolutions what is padding. `windows` (of `masks.window_mask`) and `documents` take the place of
        a mask: give one of the three.
        """
        context = self._context(x, positions, mask, cache, valid)
        if windows is not None or documents is not None:
            if mask is not None or cache is not None:
                raise ValueError(
                    "windows and documents take the place of a mask; give neither mask nor cache"
                )
            context = context._replace(windows=windows, documents=documents)
        for layer, block in enumerate(self.blocks):
            x = self.run_block(layer, block, x, context, layer)
        return self.final_norm(x)

    def flops(self) -> tuple[Flops, Flops]:
        """FLOPs per position, and per pair of a query and a key."""
        num_layers, recomputed = len(self.blocks), len(self.recomputed_positions)
        position = self.block_flops([1] * num_layers)
        mlp = self.blocks[0].get_submodule("mlp")
        if not isinstance(mlp, MoEBlock) and not self.options.dropout:
            # Recomputation stops once all inputs exist again; nothing needs the last product.
            skipped = recomputed * module_flops(mlp.get_submodule("down_proj")).forward
            position = replace(position, recomputed=position.recomputed - skipped)
        products = 4 * self.config.num_heads * self.config.head_dim  # scores and weighted sum
        pair = Flops(products * num_layers, 0, 2 * products * num_layers, products * recomputed)
        return position, pair

    def _context(
        self,
        x: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        cache: KVCache | None,
        valid: Tensor | None,
    ) -> AttentionContext:
        step = None
        is_causal = self.options.causal and mask is None
        if cache is not None:
            if mask is not None:
                raise ValueError("a cached forward takes `valid`, not a mask of its own")
            step = cache.begin(x.shape[1], valid)
            positions = step.positions if positions is None else positions
            mask, is_causal = step.mask, step.is_causal
        elif valid is not None and not self.options.conv_kernel_size:
            raise ValueError(
                "`valid` belongs to a cached forward or to convolutions; pass a mask instead"
            )
        rotary = None
        if self.options.rope_theta is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]
            rotary = rotary_angles(positions, self.config.head_dim, self.options.rope_theta)
        return AttentionContext(mask, is_causal, rotary, cache, step, valid)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, to which inputs are cast."""
        return next(self.parameters()).dtype

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of this stack's shape, in its weights' dtype and on their device."""
        config = self.config
        return KVCache(
            config.num_layers,
            batch_size,
            max_length,
            config.num_kv_heads,
            config.head_dim,
            dtype=self.dtype,
            device=next(self.parameters()).device,
        )


def init_weights(module: nn.Module, num_layers: int, std: float = INIT_STD) -> None:
    """Draw linear and embedding weights from N(0, std^2), biases zero, norms as they are.

    Projections that write into the residual stream are scaled by 1/sqrt(2 * num_layers), so that
    its variance does not grow with depth (Radford et al. 2019, GPT-2).
    """
    residual_std = std / math.sqrt(2 * num_layers)
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            is_residual = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(child.weight, std=residual_std if is_residual else std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=std)
        elif isinstance(child, Experts):
            nn.init.normal_(child.gate_up_proj, std=std)
            nn.init.normal_(child.down_proj, std=residual_std)
