"""FLOPs of training, per unit of work: a position, a query-key pair, an image, a frame, ...

Every model has a method `flops` that returns its cost per unit from the shapes of its own weights, so
the cost of a batch is linear in the units that it holds. A multiply-add counts 2. Only matrix products
and convolutions count, as in torch's FlopCounterMode, against which the tests check all of it.
Attention counts a pair whether it is masked or not (PaLM, arXiv:2204.02311, appendix B).
`operator_flops` counts single operators in the same way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from muomni.models.layers.moe import MoEBlock


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a model: all, those that one token uses, and those in embedding tables."""

    total: int
    active: int
    embedding: int


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one unit of work: forward, both halves of backward, and activation checkpointing.

    `weight_grad` is zero for frozen weights, `input_grad` for products with data.
    """

    forward: int = 0
    weight_grad: int = 0
    input_grad: int = 0
    recomputed: int = 0

    def model(self, has_gradient: bool = True) -> int:
        """What training needs: forward and backward, or forward alone without a gradient."""
        return self.forward + has_gradient * (self.weight_grad + self.input_grad)

    def hardware(self, has_gradient: bool = True) -> int:
        """What the device computes: also the activations that it recomputes."""
        return self.model(has_gradient) + has_gradient * self.recomputed

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, number: int) -> "Flops":
        return Flops(*(flops * number for flops in astuple(self)))


def weight_flops(weight: Tensor, num_active: int | None = None) -> Flops:
    """One vector through a matrix or kernel, of which `num_active` elements are used (default: all)."""
    forward = 2 * (weight.numel() if num_active is None else num_active)
    return Flops(forward, forward * weight.requires_grad, forward)


def module_flops(module: nn.Module, times: int = 1, is_first: bool = False) -> Flops:
    """One vector through every matrix and kernel of `module` in turn, `times` times over.

    A mixture of experts counts the experts that a token is routed to. `is_first`: the input is data.
    """
    idle, total = dict(_idle_experts(module)), Flops()
    for part in module.modules():
        if not isinstance(part, nn.Embedding):
            for weight in part.parameters(recurse=False):
                if weight.ndim > 1:
                    total += weight_flops(weight, weight.numel() - idle.get(weight, 0))
    return replace(total, input_grad=0 if is_first else total.input_grad) * times


def forward_flops(costs: Mapping[str, Flops], units: Mapping[str, int]) -> int:
    """FLOPs of a forward pass over these units of work."""
    return sum(costs[unit].forward * number for unit, number in units.items())


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model, which may be on the meta device; tied weights count once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    idle = sum(number for _, number in _idle_experts(model))
    return ParameterCount(total, total - idle, embedding)


def _idle_experts(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights of experts, and how many of their elements a token does not use."""
    for module in model.modules():
        if isinstance(module, MoEBlock):
            for weight in module.experts.parameters():
                num_idle = module.num_experts - module.top_k
                yield weight, weight.numel() * num_idle // module.num_experts


def operator_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one operator as a dispatch mode sees it; 0 unless it is a matrix product or convolution.

    Fused attention counts two products, and four in its backward pass: what a kernel recomputes to save
    memory is not counted.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet in _FORWARD_ATTENTION:
        return _attention_products(*args[:3])
    if packet in _BACKWARD_ATTENTION:
        return 2 * _attention_products(*args[1:4])
    # The registry takes all documents for as long as the longest if lengths are unknown, on the meta device.
    if str(packet) == "torch_attn._varlen_attn" and args[0].is_meta:
        return _document_products(args[0], args[2], longest=args[6])
    if str(packet) == "torch_attn._varlen_attn_backward" and args[1].is_meta:
        return 2 * _document_products(args[1], args[3], longest=args[9])
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _attention_products(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Scores and weighted sum over all keys; [B, H, T, D] each."""
    batch, num_heads, length, size = query.shape
    return 2 * batch * num_heads * length * key.shape[-2] * (size + value.shape[-1])


def _document_products(query: Tensor, value: Tensor, longest: int) -> int:
    """An upper bound: each position [T, H, D] attends to as many as the longest document has."""
    num_queries, num_heads, size = query.shape
    return 2 * num_queries * num_heads * longest * (size + value.shape[-1])


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
# Operators of scaled_dot_product_attention: forward (q, k, v, ...), backward (gradient, q, k, v, ...).
_FORWARD_ATTENTION, _BACKWARD_ATTENTION = (
    {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}") for kernel in _KERNELS}
    for suffix in ("", "_backward")
)
