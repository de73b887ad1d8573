"""Code paths of accelerators, without one: their numbers on a CPU, and their kernels on the meta device."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that launch no kernel.
_VIEWS = {
    "view", "transpose", "expand", "slice", "unsqueeze", "squeeze", "select", "t", "permute", "detach", "alias",
    "split", "split_with_sizes", "unbind", "as_strided", "_unsafe_view", "_reshape_alias", "empty",
    "empty_like", "new_empty", "lift_fresh",
}  # fmt: skip


class Accelerated(Tensor):
    """A CPU tensor that takes the code paths of accelerators; so do results that are computed from it."""

    is_cpu = False  # type: ignore[assignment]


def accelerated(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Accelerated)


class KernelCount(TorchDispatchMode):
    """Counts kernels, and the bytes of their inputs and outputs, which a GPU reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.num_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in _VIEWS:
            self.kernels[name] += 1
            used = {id(t): t for t in _tensors([args, list((kwargs or {}).values()), output])}
            self.num_bytes += sum(t.numel() * t.element_size() for t in used.values())
        return output


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


class FusedNorm(torch.autograd.Function):
    """One kernel forward and one backward, as CUDA's RMS norm; the meta device has only its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return torch.addcmul(grads[0], x, weight), None, torch.empty_like(weight), None


class FusedAttention(torch.autograd.Function):
    """One kernel forward and one backward, without its traffic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)
