"""Parameter groups, AdamW and the learning-rate schedule."""

import math

import torch
from torch import nn

from muomni.config.run import OptimSection


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; vectors (norms, biases, scales) and embeddings do not."""
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    decayed, plain = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if matrix else plain).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, optim: OptimSection, groups: list[dict[str, object]] | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) in its fused form, on CPU and GPU alike.

    `groups` replace the module's own `parameter_groups`.
    """
    groups = groups or parameter_groups(module, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def lr_factor(step: int, num_steps: int, optim: OptimSection) -> float:
    """Share of the peak rate for the step after `step` finished ones, of `num_steps` in all."""
    num_warmup = round(optim.warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    if optim.schedule == "constant":
        return 1.0
    progress = (step - num_warmup) / max(1, num_steps - 1 - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * cosine
