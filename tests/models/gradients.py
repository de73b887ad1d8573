"""Gradients of tensors in tests."""

from torch import Tensor


def grad(tensor: Tensor) -> Tensor:
    """The gradient of a tensor, which must have one."""
    assert tensor.grad is not None
    return tensor.grad
