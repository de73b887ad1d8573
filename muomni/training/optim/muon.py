"""Muon for hidden matrices, AdamW for all other parameters, in one optimizer.

DeepSpeed has its own Muon for ZeRO 1-3, but it orthogonalizes gradients before it clips them, so
`optim.max_grad_norm` limits the size of updates and scales all other gradients of the step: in DeepSpeed
0.19.8 a limit of 1 cuts the update of one 16 x 16 matrix from norm 2.02 to 1.00 under ZeRO 1 and 2, no matter
how small its gradient was. Here Muon runs without ZeRO, so that each rank holds full matrices and clips
first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from muomni.errors import ConfigError


def hidden_matrices(module: nn.Module) -> set[int]:
    """Ids of the weights of linear layers inside transformer blocks, which Muon is designed for.

    Embeddings, input and output projections, heads, convolutions, and stacked experts [E, out, in] are not.
    """
    return {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "blocks" in name.split(".")
    }


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

    Muon updates are scaled by 0.2 * sqrt(max(rows, columns)), so that learning rate and decay match those of
    AdamW (Liu et al., 2025, arXiv:2502.16982).
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
            self._groups(is_muon=True), lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(
            self._groups(is_muon=False), lr=lr, betas=betas, eps=eps, fused=True
        )

    def _groups(self, is_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["is_muon"] is is_muon]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        # Set as for torch's fused optimizers, which read it on the device.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.is_cpu:
            if found_inf:
                return loss
            found_inf = None
        for optimizer, is_muon in ((self._muon, True), (self._adamw, False)):
            # Loading a checkpoint, and engines with master weights, replace groups and state.
            optimizer.param_groups = self._groups(is_muon)
            optimizer.state = self.state
        if found_inf is None:
            self._muon.step()
        else:
            self._step_muon_unless(found_inf)
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        return loss

    @torch.no_grad()
    def _step_muon_unless(self, found_inf: Tensor) -> None:
        """Update matrices one by one, and restore each if `found_inf`, which stays on the device."""
        is_bad = found_inf.bool()
        for group in self._groups(is_muon=True):
            for weight in group["params"]:
                momentum = self.state[weight].setdefault(
                    "momentum_buffer", torch.zeros_like(weight)
                )
                before = weight.clone(), momentum.clone()
                self._muon.param_groups = [{**group, "params": [weight]}]
                self._muon.step()
                for tensor, old in zip((weight, momentum), before, strict=True):
                    tensor.copy_(torch.where(is_bad, old, tensor))
