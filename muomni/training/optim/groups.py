"""Parameter groups, and the optimizer over them."""

import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from muomni.config.loading import did_you_mean
from muomni.config.run import OptimSection
from muomni.errors import ConfigError
from muomni.io.hashing import sha256_bytes
from muomni.training.optim.muon import MuonWithAdamW, hidden_matrices

_VECTORS, _MATRICES, _HIDDEN = _KINDS = "vectors and embeddings", "matrices", "hidden matrices"


@dataclass(slots=True)
class ParameterGroup:
    """Parameters with the same rate and decay, selected by `patterns` of `optim.lr_scales`."""

    kind: str
    lr: float
    weight_decay: float
    parameters: list[nn.Parameter] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    @property
    def is_muon(self) -> bool:
        return self.kind == _HIDDEN

    def settings(self) -> dict[str, Any]:
        """The group as an argument of an optimizer."""
        return {"params": self.parameters, "weight_decay": self.weight_decay, "lr": self.lr}

    def __str__(self) -> str:
        return (
            f"optimizes {self.kind} of {', '.join(self.patterns)}: {_count(self.parameters)} parameters, "
            f"lr {self.lr:g}, weight decay {self.weight_decay:g}{' by Muon' if self.is_muon else ''}"
        )


def parameter_groups(module: nn.Module, optim: OptimSection) -> list[ParameterGroup]:
    """Group parameters by weight decay and by `lr_scales`.

    Matrices decay; vectors (norms, biases, scales) and embeddings do not. With `optim.name=muon` hidden
    matrices have their own groups, at `muon_lr`. Frozen parameters are in no group, so neither optimizer nor
    ZeRO keeps state for them. Patterns are shell patterns over parameter names of the stage's model (without
    the attribute name of the model in its task). Raises ConfigError for a pattern without a match, and for
    muon without a hidden matrix.
    """
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    names = [name.partition(".")[2] for name, _ in module.named_parameters()]
    for pattern in optim.lr_scales:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({f"{name.partition('.')[0]}.*" for name in names})
            raise ConfigError(
                f"optim.lr_scales pattern '{pattern}' matches no parameter{did_you_mean(pattern, parts)}; "
                f"parts are {', '.join(parts)}"
            )
    hidden = hidden_matrices(module) if optim.name == "muon" else set()
    groups: dict[tuple[int, float], ParameterGroup] = {}
    for name, parameter in zip(names, module.parameters(), strict=True):
        if not parameter.requires_grad:
            continue
        if id(parameter) in hidden:
            kind = _HIDDEN
        elif parameter.ndim >= 2 and id(parameter) not in embeddings:
            kind = _MATRICES
        else:
            kind = _VECTORS
        pattern = next((p for p in optim.lr_scales if fnmatchcase(name, p)), None)
        scale = 1.0 if pattern is None else optim.lr_scales[pattern]
        key = (_KINDS.index(kind), scale)
        if key not in groups:
            lr = (optim.muon_lr or optim.lr) if kind == _HIDDEN else optim.lr
            decay = 0.0 if kind == _VECTORS else optim.weight_decay
            groups[key] = ParameterGroup(kind, lr * scale, decay)
        group = groups[key]
        group.parameters.append(parameter)
        label = pattern or ("all else" if optim.lr_scales else "all parts")
        if label not in group.patterns:
            group.patterns.append(label)
    if optim.name == "muon" and not any(group.is_muon for group in groups.values()):
        raise ConfigError(
            "optim.name=muon found no trainable linear layer or convolution in the stacks of this model; "
            "use optim.name=adamw"
        )
    return [group for _, group in sorted(groups.items(), reverse=True, key=lambda item: item[0])]


def groups_digest(module: nn.Module, optim: OptimSection) -> str:
    """Hash of the parameter names in each group, in order, to which optimizer state belongs."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [
        [names[id(parameter)] for parameter in group.parameters]
        for group in parameter_groups(module, optim)
    ]
    return sha256_bytes(json.dumps(groups).encode())


def describe_parameters(module: nn.Module, optim: OptimSection) -> list[str]:
    """One line per parameter group, and per model part with frozen parameters."""
    lines = [str(group) for group in parameter_groups(module, optim)]
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        part = ".".join(name.split(".")[1:2]) or name
        parts.setdefault(f"{part}.*", []).append(parameter)
    for part, parameters in parts.items():
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        if frozen:
            lines.append(f"freezes {part}: {_count(frozen)} of {_count(parameters)} parameters")
    return lines


def _count(parameters: list[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters):,}"


def build_optimizer(
    module: nn.Module, optim: OptimSection, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov and Hutter, 2019), or Muon with AdamW.

    `groups` replaces the `parameter_groups` of the module for AdamW.
    """
    if optim.name == "muon":
        marked = [
            {**group.settings(), "is_muon": group.is_muon}
            for group in parameter_groups(module, optim)
        ]
        return MuonWithAdamW(marked, optim.lr, optim.betas, optim.eps, optim.muon_momentum)
    groups = groups or [group.settings() for group in parameter_groups(module, optim)]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
