"""Parameter groups, AdamW and the learning-rate schedule."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import nn

from muomni.config.loading import did_you_mean
from muomni.config.run import OptimSection
from muomni.errors import ConfigError


def parameter_groups(module: nn.Module, optim: OptimSection) -> list[dict[str, object]]:
    """Matrices decay; vectors (norms, biases, scales) and embeddings do not; rates by `lr_scales`.

    Patterns are those of the shell, over parameter names of the stage's model (its task is their first
    part, which no pattern names). Raises ConfigError for a pattern that names nothing.
    """
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    names = [name.partition(".")[2] for name, _ in module.named_parameters()]
    for pattern in optim.lr_scales:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({f"{name.partition('.')[0]}.*" for name in names})
            raise ConfigError(
                f"optim.lr_scales names no parameter with '{pattern}'{did_you_mean(pattern, parts)}; "
                f"parts are {', '.join(parts)}"
            )
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in zip(names, module.parameters(), strict=True):
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups.setdefault((is_matrix, _lr_scale(name, optim)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if is_matrix else 0.0,
            "lr": optim.lr * scale,
        }
        for (is_matrix, scale), parameters in sorted(groups.items(), reverse=True)
    ]


def _lr_scale(name: str, optim: OptimSection) -> float:
    return next((s for p, s in optim.lr_scales.items() if fnmatchcase(name, p)), 1.0)


def build_optimizer(
    module: nn.Module, optim: OptimSection, groups: list[dict[str, object]] | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) in its fused form, on CPU and GPU alike.

    `groups` replace the module's own `parameter_groups`.
    """
    groups = groups or parameter_groups(module, optim)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


# The share of the way from the peak to the final rate that is left after `x` of the decay, 0 <= x <= 1.
_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
}


def lr_factor(step: int, num_steps: int, optim: OptimSection) -> float:
    """Share of the peak rate for the step after `step` finished ones, of `num_steps` in all.

    A linear warm-up to the peak, then the decay to `final_lr_fraction` at the last step: by a cosine over
    all steps that are left (Loshchilov and Hutter, 2017), or after a stable stretch (`wsd`: Hu et al.,
    2024, MiniCPM; `1-sqrt` is the shape of Hägele et al., 2024). A pure function of the step: a resumed
    run has the rates of an uninterrupted one.
    """
    num_warmup = round(optim.warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    if optim.schedule == "constant":
        return 1.0
    last_at_peak, shape = num_warmup, "cosine"
    if optim.schedule == "wsd":
        num_decay = round(optim.decay_fraction * num_steps)
        # However short the run, one step has the peak rate.
        last_at_peak = max(0, num_warmup - 1, num_steps - num_decay - 1)
        shape = optim.decay_shape
    progress = (step - last_at_peak) / max(1, num_steps - 1 - last_at_peak)
    decayed = _DECAYS[shape](min(1.0, max(0.0, progress)))
    return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * decayed
