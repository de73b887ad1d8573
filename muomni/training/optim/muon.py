"""Muon for hidden matrices, AdamW for all other parameters, in one optimizer.

DeepSpeed has a Muon of its own for ZeRO 1-3, but it orthogonalizes gradients before it clips them:
`optim.max_grad_norm` then limits the size of updates, and with it that of all other gradients of the step.
In DeepSpeed 0.19.8 a limit of 1 cuts the update of one 16 x 16 matrix from norm 2.02 to 1.00 under ZeRO 1
and 2, however small its gradient was. So Muon runs without ZeRO here, where whole matrices lie on each
rank and clipping comes first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from muomni.errors import ConfigError


def hidden_matrices(module: nn.Module) -> set[int]:
    """Ids of the weights of linear layers inside transformer blocks, which Muon is made for.

    Embeddings, projections at the ends, heads, convolutions and stacked experts [E, out, in] are not.
    """
    return {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "blocks" in name.split(".")
    }


def check_support(zero_stage: int, has_expert_parallel: bool) -> None:
    """Raises ConfigError for an engine under which no rank holds whole matrices and gradients."""
    if zero_stage:
        raise ConfigError(
            f"optim.name=muon runs without ZeRO, the DeepSpeed config asks for stage {zero_stage}; "
            f"give --deepspeed_config configs/deepspeed/zero0.json, or optim.name=adamw"
        )
    if has_expert_parallel:
        raise ConfigError(
            "optim.name=muon does not run with expert_parallel; take that section out of the DeepSpeed "
            "config, or give optim.name=adamw"
        )


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) on groups with `is_muon`, AdamW on the others.

    Updates of Muon are scaled by 0.2 * sqrt(max(rows, columns)), so that rates and decay are in the units
    of AdamW (Liu et al., 2025, arXiv:2502.16982).
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
        # Set as for torch's fused optimizers, which read it on the device; Muon is none and has to wait.
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf:
            return loss
        for optimizer, is_muon in ((self._muon, True), (self._adamw, False)):
            # Loading a checkpoint, and an engine that holds fp32 copies, put others in their places.
            optimizer.param_groups = self._groups(is_muon)
            optimizer.state = self.state
            optimizer.step()
        return loss
