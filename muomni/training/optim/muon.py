"""Muon for hidden matrices and convolution kernels, AdamW for all other parameters, in one optimizer.

DeepSpeed has its own Muon for ZeRO 1-3, but it orthogonalizes gradients before it clips them, so
`optim.max_grad_norm` limits the size of updates and scales all other gradients of the step: in DeepSpeed
0.19.8 a limit of 1 cuts the update of one 16 x 16 matrix from norm 2.02 to 1.00 under ZeRO 1 and 2, no matter
how small its gradient was. Here Muon runs without ZeRO, so that each rank holds full matrices and clips
first.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from muomni.errors import ConfigError
from muomni.models.layers.blocks import BlockRunner


def hidden_matrices(module: nn.Module) -> set[int]:
    """Ids of the weights of linear layers and convolutions inside stacks, which Muon is designed for.

    These are the layers in the module lists of transformer stacks and codec halves. Embeddings, input and
    output projections, heads, depthwise convolutions, and stacked experts [E, out, in] are not.
    """
    stacks = [part for part in module.modules() if isinstance(part, BlockRunner)]
    lists = [
        part for stack in stacks for part in stack.children() if isinstance(part, nn.ModuleList)
    ]
    return {id(layer.weight) for part in lists for layer in part.modules() if _is_dense(layer)}


def _is_dense(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d]:
    """Whether each output depends on all inputs."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1
    return isinstance(layer, nn.Linear)


def check_support(zero_stage: int, has_expert_parallel: bool) -> None:
    """Raise ConfigError for an engine that shards matrices or gradients."""
    if zero_stage:
        raise ConfigError(
            f"optim.name=muon runs without ZeRO, but the DeepSpeed config sets stage {zero_stage}; "
            f"use --deepspeed_config configs/deepspeed/zero0.json, or optim.name=adamw"
        )
    if has_expert_parallel:
        raise ConfigError(
            "optim.name=muon does not work with expert_parallel; remove that section from the DeepSpeed "
            "config, or use optim.name=adamw"
        )


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) on groups with `is_muon`, AdamW on the others.

    A convolution kernel [out, in, ...] is a matrix [out, in * ...]. Muon updates are scaled by
    0.2 * sqrt(max(rows, columns)), so that learning rate and decay match those of AdamW (Liu et al., 2025,
    arXiv:2502.16982).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(groups, {"lr": lr})
        self._muon = torch.optim.Muon(
            self._matrix_groups(), lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(
            self._groups(is_muon=False), lr=lr, betas=betas, eps=eps, fused=True
        )

    def _groups(self, is_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["is_muon"] is is_muon]

    def _matrix_groups(self) -> list[dict[str, Any]]:
        """Muon's groups with each weight as a matrix [out, rest] in the same memory."""
        return [
            {**group, "params": [_as_matrix(weight) for weight in group["params"]]}
            for group in self._groups(is_muon=True)
        ]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        # Set as for torch's fused optimizers, which read it on the device.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.is_cpu:
            if found_inf:
                return loss
            found_inf = None
        self._step_muon(found_inf)
        # Loading a checkpoint, and engines with master weights, replace groups and state.
        self._adamw.param_groups = self._groups(is_muon=False)
        self._adamw.state = self.state
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        return loss

    @torch.no_grad()
    def _step_muon(self, found_inf: Tensor | None) -> None:
        """Update the matrices, one by one, and restore each if `found_inf`, which stays on the device."""
        weights = [weight for group in self._groups(is_muon=True) for weight in group["params"]]
        groups = self._matrix_groups()
        matrices = [matrix for group in groups for matrix in group["params"]]
        states = {m: self.state[w] for w, m in zip(weights, matrices, strict=True)}
        self._muon.state = defaultdict(dict, states)
        if found_inf is None:
            self._muon.param_groups = [{**self._muon.defaults, **group} for group in groups]
            self._muon.step()
            return
        is_bad = found_inf.bool()
        for group in groups:
            for matrix in group["params"]:
                momentum = states[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                before = matrix.clone(), momentum.clone()
                self._muon.param_groups = [{**self._muon.defaults, **group, "params": [matrix]}]
                self._muon.step()
                for tensor, old in zip((matrix, momentum), before, strict=True):
                    tensor.copy_(torch.where(is_bad, old, tensor))


def _as_matrix(weight: Tensor) -> Tensor:
    """A convolution kernel [out, in, ...] as a matrix [out, in * ...]; others are matrices already."""
    if weight.ndim == 2:
        return weight
    matrix = weight.detach().view(len(weight), -1)
    matrix.grad = None if weight.grad is None else weight.grad.reshape(len(weight), -1)
    return matrix
