"""Weights of a running engine: full state for exports, averaged weights, and a search for non-finite ones."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from muomni.distributed import collectives
from muomni.models.layers.moe import from_autoep
from muomni.training.engine import deepspeed_quirks as quirks
from muomni.training.engine import expert_parallel
from muomni.training.engine.ema import WeightAverage


class MasterWeights:
    """The fp32 weights that this rank's optimizer updates (its shard under ZeRO), and their average."""

    def __init__(
        self,
        optimizer: quirks.DeepSpeedOptimizer,
        zero_stage: int,
        precision: str,
        decay: float | None,
    ) -> None:
        self._optimizer = optimizer
        self._zero_stage, self._precision = zero_stage, precision
        self.average = None if decay is None else WeightAverage(self.tensors(), decay)

    def tensors(self) -> list[Tensor]:
        return quirks.master_weights(self._optimizer, self._zero_stage)

    def update_average(self, step: int) -> None:
        """Move the average, if one is kept, after the `step`-th step."""
        if self.average is not None:
            self.average.update(self.tensors(), step)

    def set_average(self, tensors: list[Tensor] | None) -> None:
        """Restore a saved average, or restart it from the current weights."""
        if self.average is not None:
            self.average.set(self.tensors() if tensors is None else tensors)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the average, if one is kept, into the model for the block; all ranks must enter."""
        if self.average is None:
            yield
            return
        self._swap(self.average)
        try:
            yield
        finally:
            self._swap(self.average)

    def _swap(self, average: WeightAverage) -> None:
        average.swap(self.tensors())
        quirks.copy_masters_to_model(self._optimizer, self._zero_stage, self._precision)


def full_state(
    task: nn.Module, prefix: str, zero_stage: int, device: torch.device
) -> dict[str, Tensor]:
    """Parameters and buffers below `prefix` as full fp32 CPU tensors on rank 0, nothing on other ranks.

    All ranks must call it; each gathers one parameter at a time. Includes the experts of all ranks, under the
    names of the plain block.
    """
    state: dict[str, Tensor] = {}
    groups = expert_parallel.expert_groups(task)
    is_main = collectives.rank() == 0
    for name, parameter in task.named_parameters():
        if name.startswith(prefix):
            full = _full_parameter(parameter, zero_stage, is_main or name in groups)
            if full is not None and name in groups:
                full = expert_parallel.gather_experts(full, groups[name], device)
            if full is not None and is_main:
                state[name.removeprefix(prefix)] = full
            del full
    if not is_main:
        return {}
    for name, buffer in task.named_buffers():
        owner, _, leaf = name.rpartition(".")
        is_persistent = leaf not in task.get_submodule(owner)._non_persistent_buffers_set
        if name.startswith(prefix) and is_persistent:
            state[name.removeprefix(prefix)] = buffer.detach().clone().cpu()
    return from_autoep(state) if groups else state


def _full_parameter(parameter: nn.Parameter, zero_stage: int, is_wanted: bool) -> Tensor | None:
    """The full fp32 parameter on the CPU, or None on ranks that only take part in gathering it."""
    full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is None:  # frozen, or an engine without master weights
        with deepspeed.zero.GatheredParameters([parameter], enabled=zero_stage == 3):
            full = parameter.detach() if is_wanted else None
    if full is None or not is_wanted:
        return None
    full = full.detach().to("cpu", copy=True).view(quirks.full_shape(parameter))
    return full.float() if full.is_floating_point() else full


def shapes_digest(task: nn.Module) -> str:
    """Hash of the names and full shapes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in task.named_parameters():
        digest.update(f"{name} {list(quirks.full_shape(parameter))}\n".encode())
    return digest.hexdigest()


def first_non_finite_weight(task: nn.Module, device: torch.device) -> str | None:
    """The first parameter or buffer that is non-finite on any rank, or None; every rank must call it."""
    weights = {name: quirks.local_elements(p) for name, p in task.named_parameters()}
    weights |= {n: b for n, b in task.named_buffers() if b.is_floating_point()}
    names = list(weights)
    finite = [torch.isfinite(tensor.detach()).all() for tensor in weights.values()]
    # Offloaded weights are on the host, buffers are not.
    local = torch.stack([each.to(device) for each in finite]).tolist() if finite else []
    firsts = collectives.gather_objects(local.index(False) if False in local else len(names))
    return [*names, None][min(firsts)]


def restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Undo DeepSpeed's cast of buffers to 16 bits: statistics and codebooks need fp32."""
    for name, buffer in buffers.items():
        expert_parallel.buffer_owner(module, name)._buffers[name.rpartition(".")[2]] = buffer
