"""The transformer of all models: feed-forwards, convolution, pre-norm block, stack.

Thinker, Talker, audio encoder, vision tower, and text tower are all a `TransformerStack` with different
`StackOptions`.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import TransformerConfig
from muomni.models.layers.attention import (
    Attention,
    AttentionContext,
    Documents,
    DropoutKeys,
    RMSNorm,
    StackOptions,
    make_norm,
    rotary_angles,
)
from muomni.models.layers.blocks import BlockRunner
from muomni.models.layers.counter_random import channel_keys, keyed_dropout
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.layers.kv_cache import KVCache
from muomni.models.layers.masks import additive_mask
from muomni.models.layers.moe import Experts, MoEBlock

INIT_STD = 0.02
_BLOCK_DROPOUTS = 3  # after attention, convolution, and feed-forward


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

    After Gulati et al. 2020, arXiv:2005.08100, with RMSNorm instead of batch norm, so that the result
    does not depend on the other samples of a batch.
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
        """[B, T, hidden_size] -> the same shape; padding (`valid` [B, T] is False) is read as zeros."""
        x = F.glu(self.up_proj(x), dim=-1)
        if valid is not None:
            x = x * valid[:, :, None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.down_proj(F.silu(self.norm(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), optionally a convolution, x + feed-forward(norm(x))."""

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
        self.dropout = options.dropout

    def forward(self, x: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        """[B, T, hidden_size] -> [B, T, hidden_size]."""
        attended = self.attention(self.attention_norm(x), context, layer)
        x = x + self._drop(attended, context, 0)
        if self.conv is not None:
            x = x + self._drop(self.conv(self.conv_norm(x), context.valid), context, 1)
        return x + self._drop(self.mlp(self.mlp_norm(x)), context, 2)

    def _drop(self, x: Tensor, context: AttentionContext, use: int) -> Tensor:
        if context.dropout is None:
            return x
        positions, channels = context.dropout
        return keyed_dropout(x, positions, channels[use], self.dropout)


def _make_mlp(config: TransformerConfig, options: StackOptions) -> nn.Module:
    if options.moe is not None:
        shared_size = options.moe.shared_intermediate_size
        shared = None if shared_size is None else SwiGLU(config.hidden_size, shared_size)
        return MoEBlock(config.hidden_size, options.moe, shared)
    if options.mlp == "swiglu":
        return SwiGLU(config.hidden_size, config.intermediate_size, options.bias)
    return GeluMLP(config.hidden_size, config.intermediate_size, options.bias)


class TransformerStack(BlockRunner):
    """Blocks and a final norm, for causal and bidirectional models.

    With `attends_by_documents`, the enclosing model passes `documents` instead of masks.
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
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, T, hidden_size] -> normed hidden states of the same shape.

        `positions` [B, T] default to 0..T-1, or with a cache to the number of real tokens so far.
        `mask` (bool, True = attend, or additive) is broadcastable to [B, H, T, T] and complete: a causal
        stack with a mask adds no causality. A cache brings its own mask, and `valid` [B, T] marks the
        real tokens among the new ones; without a cache it marks padding for convolutions. `windows` (of
        `masks.window_mask`) and `documents` replace the mask. `dropout_keys` int32 [B, T]
        (`counter_random.position_keys`) are required in training with dropout. Raises ValueError when
        arguments are missing or conflict.
        """
        context = self._context(x, positions, mask, cache, valid)
        if windows is not None or documents is not None:
            if mask is not None or cache is not None:
                raise ValueError(
                    "windows and documents replace the mask; pass neither a mask nor a cache"
                )
            context = context._replace(windows=windows, documents=documents)
        channels = self._dropout_channels(x, dropout_keys)
        for layer, block in enumerate(self.blocks):
            if dropout_keys is not None and channels is not None:
                context = context._replace(dropout=DropoutKeys(dropout_keys, channels[layer]))
            x = self.run_block(layer, block, x, context, layer)
        return self.final_norm(x)

    @property
    def num_dropouts(self) -> int:
        """Uses of dropout in all blocks; a model numbers its own ones from here."""
        return _BLOCK_DROPOUTS * len(self.blocks)

    def _dropout_channels(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor | None:
        """Channel keys [num_layers, 3, hidden_size], or None without dropout."""
        if not self.training or not self.options.dropout:
            return None
        if dropout_keys is None:
            raise ValueError("dropout in training needs dropout_keys")
        keys = channel_keys(0, self.num_dropouts, x.shape[2], x.device)
        return keys.unflatten(0, (len(self.blocks), _BLOCK_DROPOUTS))

    def flops(self) -> tuple[Flops, Flops]:
        """FLOPs per position, and per pair of a query and a key."""
        num_layers, recomputed = len(self.blocks), len(self.recomputed_blocks)
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
                raise ValueError("a cached forward pass takes `valid` instead of a mask")
            step = cache.begin(x.shape[1], valid)
            positions = step.positions if positions is None else positions
            mask, is_causal = step.mask, step.is_causal
        elif valid is not None and not self.options.conv_kernel_size:
            raise ValueError("`valid` requires a cache or convolutions; pass a mask instead")
        if mask is not None and mask.dtype == torch.bool and not mask.is_cpu:
            mask = additive_mask(mask, self.dtype)
        rotary = None
        if self.options.rope_theta is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]
            rotary = rotary_angles(positions, self.config.head_dim, self.options.rope_theta)
        return AttentionContext(mask, is_causal, rotary, cache, step, valid)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, to which inputs are cast."""
        return next(self.parameters()).dtype

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` positions, in the dtype and on the device of the weights."""
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
    """Initialize linear and embedding weights from N(0, std^2) and biases with zero; keep norms.

    Projections into the residual stream are scaled by 1/sqrt(2 * num_layers), so that its variance
    does not grow with depth (Radford et al. 2019, GPT-2).
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
