"""What CUDA kernels keep for the backward pass and allocate on the side, for traces on the meta device.

Attention on the meta device would be torch's composite of matrix products, with all scores. CUDA has fused
kernels (flash, memory-efficient, cuDNN), which keep query, key, value, output, and the log-sum-exp of each
query (Dao 2023, arXiv:2307.08691). They take no boolean masks: torch converts one to a bias of the query's
dtype in each call, with rows padded to 16 elements, and autograd keeps it. The backward pass sums query
gradients in fp32, and has key and value gradients of each query head. Where kernels differ, the larger need is
taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muomni.models.layers.moe import Experts

# cuBLAS allocates it at the first product; the size that torch chooses for Hopper, the largest.
MATMUL_WORKSPACE_BYTES = 32 * 2**20

_BIAS_ALIGNMENT = 16


@contextmanager
def stand_ins() -> Iterator[None]:
    """Replace attention by a stand-in for the fused CUDA kernels, and the load of experts by an even one."""
    attention, experts = F.scaled_dot_product_attention, Experts.forward

    def with_even_load(self: Experts, x: Tensor, counts: Any) -> Tensor:
        is_unknown = isinstance(counts, Tensor) and counts.is_meta
        return experts(self, x, even_counts(len(x), len(counts)) if is_unknown else counts)

    # Not by a TorchFunctionMode, which recomputation in the backward pass would not see.
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    Experts.forward = with_even_load
    try:
        yield
    finally:
        F.scaled_dot_product_attention, Experts.forward = attention, experts


def even_counts(total: int, num_bins: int) -> Tensor:
    """Tokens per expert with a balanced router: int64 [num_bins]."""
    counts = torch.full((num_bins,), total // num_bins)
    counts[: total % num_bins] += 1
    return counts


def allocate_scratch(func: Any, args: tuple[Any, ...]) -> None:
    """Allocate the buffers of a flash kernel's backward pass and release them, so that a peak includes them."""
    if str(func).startswith("torch_attn._varlen_attn_backward"):
        query, key, value = args[1:4]
        _backward_buffers(query, key, value, head_dim=1)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """[B, H, T, D], [B, K, S, D] -> [B, H, T, D], with the memory of a fused kernel."""
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.where(
            bias, torch.zeros((), dtype=query.dtype, device=query.device), -torch.inf
        )
    if bias is not None and bias.shape[-1] % _BIAS_ALIGNMENT:
        bias = F.pad(bias, (0, -bias.shape[-1] % _BIAS_ALIGNMENT))
    return _FusedAttention.apply(query, key, value, bias)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        mixed = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mixed, log_sum, bias)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        _backward_buffers(query, key, value, head_dim=1)
        return (*grads, None)


def _backward_buffers(query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> None:
    """Allocate fp32 sums of query gradients, their products with the output, and gradients per query head."""
    buffers = [
        query.new_empty(query.shape, dtype=torch.float32),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    ]
    for tensor in (key, value):
        if tensor.shape[head_dim] != query.shape[head_dim]:
            shape = list(tensor.shape)
            shape[head_dim] = query.shape[head_dim]
            buffers.append(tensor.new_empty(shape))
    del buffers
