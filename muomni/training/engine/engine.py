"""The one place that talks to DeepSpeed's engine.

It completes the engine config, keeps buffers in fp32, turns loss sums into gradients of the global mean
(contract *Loss*), and gathers whole fp32 weights for exports. Gradients are those of
sum(losses of all ranks and micro-batches) / sum(their weights), whatever the split: DeepSpeed averages
over ranks, so each micro-batch's sum is multiplied by world size / global weight.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from muomni.config.run import OptimSection, RunConfig
from muomni.distributed import collectives
from muomni.distributed.compiler import add_interpreter_folder, missing_for_compiling
from muomni.distributed.shared_memory import release_names
from muomni.errors import ConfigError
from muomni.models.layers.blocks import not_compiled
from muomni.models.layers.moe import from_autoep
from muomni.observe.step_clock import StepClock
from muomni.training.engine import ds_config, expert_parallel
from muomni.training.engine.ema import WeightAverage
from muomni.training.optim.groups import build_optimizer, parameter_groups
from muomni.training.stage import StageOutput

logger = logging.getLogger(__name__)


class Engine:
    """A DeepSpeed engine around a stage's task module."""

    def __init__(
        self,
        task: nn.Module,
        config: RunConfig,
        engine_json: dict[str, Any],
        precision: str,
        num_accumulation: int,
        device: torch.device,
    ) -> None:
        if precision == "fp16" and device.type == "cpu":
            # CPUs compute fp16 slowly but correctly; DeepSpeed asks before it agrees.
            accelerator: Any = get_accelerator()
            accelerator.is_fp16_supported = lambda: True
        self.zero_stage = ds_config.zero_stage(engine_json)
        self.precision = precision
        self.num_accumulation = num_accumulation
        full = ds_config.complete(
            engine_json, config, precision, num_accumulation, collectives.world_size()
        )
        # Plain fp32 without ZeRO is the one engine that clips without telling the norm.
        self._clips_itself = self.zero_stage == 0 and precision == "fp32"
        if self._clips_itself:
            full["gradient_clipping"] = 0.0
        # DeepSpeed divides the gradients of every fp16 engine by the loss scale, but multiplies the loss
        # only where ZeRO is on.
        self._scales_itself = self.zero_stage == 0 and precision == "fp16"
        self._own_scale = 1.0
        self._max_grad_norm = config.optim.max_grad_norm
        self._own_norm: torch.Tensor | None = None
        self._own_skips = torch.zeros((), device=device)
        # Steps in a row, up to the last one, whose gradients were not finite at a loss scale that cannot
        # fall: all ranks count the same. Weights stay as they are in such a step.
        self.num_bad_steps: int | torch.Tensor = 0
        self.num_expert_ranks = expert_parallel.group_size(full)
        self._device = device
        task.to(device)
        buffers = {name: buffer.clone() for name, buffer in task.named_buffers()}
        optimizer: Any = partial(_moe_optimizer, task, config.optim)
        if not self.num_expert_ranks:
            optimizer = build_optimizer(task, config.optim)
        with quiet_deepspeed():
            parts: Any = deepspeed.initialize(model=task, optimizer=optimizer, config=full)
        self.deepspeed, self.optimizer, _, _ = parts
        if self.zero_stage == 0 and collectives.world_size() == 1:
            # There is nothing to sum up. DeepSpeed would copy all gradients to a buffer and back.
            self.deepspeed.buffered_allreduce_fallback = self._fill_missing_gradients
        if self.zero_stage == 0 and precision != "fp32":
            _undo_warm_up_step(self.optimizer)
        if self.zero_stage and precision == "fp16":
            # At its smallest scale it would raise in the midst of a step; who counts steps decides.
            self.optimizer.loss_scaler.raise_error_at_min_scale = False
        self._min_scale = config.fp16.min_scale if precision == "fp16" else 1.0
        _restore_buffers(self.task, buffers)
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        decay = config.training.ema_decay
        self.average = None if decay is None else WeightAverage(self._master_weights(), decay)

    @property
    def task(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, batch: dict[str, torch.Tensor]) -> StageOutput:
        return self.deepspeed(batch)

    def backward(
        self,
        output: StageOutput,
        global_weights: dict[str, torch.Tensor],
        loss_weights: dict[str, float],
    ) -> None:
        """Add this micro-batch's share of the gradient of the window's mean loss."""
        num_ranks = collectives.world_size()
        total = sum(
            # A term that no rank has in this step weighs nothing; its sum is zero, too.
            loss_weights[term] * num_ranks * loss / global_weights[term].clamp(min=1e-6)
            for term, loss in output.losses.items()
        )
        if self._scales_itself:
            self._own_scale = self.loss_scale
        if self.zero_stage:
            # DeepSpeed tells it by hooks on the tensors that a forward pass returns, and does not find
            # those of a StageOutput. Offload then takes the first micro-batch for the last one.
            is_last = self.deepspeed.is_gradient_accumulation_boundary()
            self.optimizer.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(total * self._own_scale, scale_wrt_gas=False)

    def time_reductions(self, clock: StepClock) -> None:
        """Let `clock` tell the reduction of gradients, at the end of backward, from backward itself."""
        reduce = self.deepspeed.allreduce_gradients

        def timed_reduce(*args: Any, **kwargs: Any) -> None:
            with clock.section("communication"):
                reduce(*args, **kwargs)

        self.deepspeed.allreduce_gradients = timed_reduce

    def _fill_missing_gradients(self, **_sizes: Any) -> None:
        """What else DeepSpeed's reduction does: AdamW decays weights that had no part in a loss, too."""
        for parameter in self.task.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def end_micro_step(self, lr_factor: float) -> None:
        """Count a micro-step; on the last of a window clip, update and zero the gradients.

        When gradients are not finite on any rank, the weights stay as they are on all.
        """
        is_last = self.deepspeed.is_gradient_accumulation_boundary()
        scale = self.loss_scale
        if is_last:
            for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
                group["lr"] = base * lr_factor
            if self._clips_itself:
                self._clip()
        self.deepspeed.step()
        if is_last and not self._clips_itself:
            is_bad = self.optimizer.overflow and scale <= self._min_scale
            self.num_bad_steps = self.num_bad_steps + 1 if is_bad else 0

    def _clip(self) -> None:
        """Clip whole gradients by their norm, and let the optimizer pass over those that are not finite."""
        limit = self._max_grad_norm or float("inf")
        if self.num_expert_ranks:
            norm = expert_parallel.clip_grad_norm(self.task, limit)
        else:
            norm = clip_grad_norm_(self.task.parameters(), max_norm=limit)
        is_bad = (~torch.isfinite(norm)).view(()).float()
        # As torch's GradScaler tells it: on the device, without waiting for it.
        self.optimizer.found_inf = is_bad
        self._own_norm = norm
        self._own_skips += is_bad
        self.num_bad_steps = (self.num_bad_steps + 1) * is_bad

    @property
    def grad_norm(self) -> float:
        """Norm before clipping of the last step's gradient, NaN when the step was skipped."""
        norm = self._own_norm if self._clips_itself else self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm) / self._own_scale

    @property
    def loss_scale(self) -> float:
        scale = getattr(self.optimizer, "cur_scale", getattr(self.optimizer, "loss_scale", 1.0))
        return float(scale) if self.precision == "fp16" else 1.0

    def count_skipped(self) -> int:
        """Steps of the whole run whose gradients were not finite, so that weights stayed; at logging only."""
        self.deepspeed.skipped_steps += int(self._own_skips)  # which its checkpoints keep
        self._own_skips.zero_()
        return int(self.deepspeed.skipped_steps)

    def first_non_finite_weight(self) -> str | None:
        """The first parameter or buffer that is not finite on any rank, or None; every rank must call it."""
        weights = {name: _own_elements(p) for name, p in self.task.named_parameters()}
        weights |= {n: b for n, b in self.task.named_buffers() if b.is_floating_point()}
        names = list(weights)
        finite = [torch.isfinite(tensor.detach()).all() for tensor in weights.values()]
        # Offloaded weights lie on the host, buffers do not.
        own = torch.stack([each.to(self._device) for each in finite]).tolist() if finite else []
        firsts = collectives.gather_objects(own.index(False) if False in own else len(names))
        return [*names, None][min(firsts)]

    def update_average(self, step: int) -> None:
        """Move the average of the weights, if one is kept, at the end of the `step`-th step."""
        if self.average is not None:
            self.average.update(self._master_weights(), step)

    def set_average(self, tensors: list[torch.Tensor] | None) -> None:
        """Go on from a saved average, or begin one with the weights as they are now."""
        if self.average is not None:
            self.average.set(self._master_weights() if tensors is None else tensors)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Run the block with the average in place of the weights, if one is kept; all ranks must enter."""
        if self.average is None:
            yield
            return
        self._exchange(self.average)
        try:
            yield
        finally:
            self._exchange(self.average)

    def _exchange(self, average: WeightAverage) -> None:
        average.swap(self._master_weights())
        self._copy_masters_to_model()

    def _master_weights(self) -> list[torch.Tensor]:
        """The fp32 weights that this rank's optimizer updates: its share of them under ZeRO."""
        if self.zero_stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        if self.zero_stage:
            return list(self.optimizer.single_partition_of_fp32_groups)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _copy_masters_to_model(self) -> None:
        """Give the model the fp32 weights anew, as the end of a step does."""
        optimizer = self.optimizer
        if self.zero_stage == 3:
            optimizer._partition_all_parameters()
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.zero_stage:
            optimizer.update_lp_params()
        elif self.precision != "fp32":
            for short, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master in zip(short, full, strict=True):
                    parameter.data.copy_(master.data)

    def train(self) -> None:
        self.deepspeed.train()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode without gradient."""
        self.deepspeed.eval()
        try:
            with torch.no_grad(), not_compiled():
                yield
        finally:
            self.deepspeed.train()

    def full_state(self, prefix: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers below `prefix` as whole fp32 CPU tensors; all ranks must call it.

        Experts of all ranks are there, too, under the names of the plain block.
        """
        state: dict[str, torch.Tensor] = {}
        groups = expert_parallel.expert_groups(self.task)
        for name, parameter in self.task.named_parameters():
            if name.startswith(prefix):
                full = self._full_parameter(parameter)
                if name in groups:
                    full = expert_parallel.gather_experts(full, groups[name], self._device)
                state[name.removeprefix(prefix)] = full
        for name, buffer in self.task.named_buffers():
            owner, _, leaf = name.rpartition(".")
            if name.startswith(prefix) and leaf not in (
                self.task.get_submodule(owner)._non_persistent_buffers_set
            ):
                state[name.removeprefix(prefix)] = buffer.detach().clone().cpu()
        return from_autoep(state) if groups else state

    def _full_parameter(self, parameter: nn.Parameter) -> torch.Tensor:
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is None:  # frozen, or an engine without fp32 copies
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                full = parameter.detach()
        full = (
            full.detach().to("cpu", copy=True).view(getattr(parameter, "ds_shape", parameter.shape))
        )
        return full.float() if full.is_floating_point() else full


def _own_elements(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter, or under ZeRO-3 this rank's part of it without the uninitialized padding at its end."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    divided: Any = parameter
    size = divided.ds_tensor.numel()
    num_left = divided.ds_numel - divided.ds_zero_partition_rank * size
    return divided.ds_tensor[: max(0, min(size, num_left))]


def _moe_optimizer(task: nn.Module, optim: OptimSection, _parameters: object) -> Any:
    """The optimizer over expert-parallel layers; DeepSpeed calls this once it has made them.

    ZeRO partitions experts over fewer ranks than the rest, so it wants them in groups of their own.
    """
    groups = [
        {**group.settings(), "name": f"group{number}"}
        for number, group in enumerate(parameter_groups(task, optim))
    ]
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    if not any(group.get("moe") for group in split):
        raise ConfigError(
            "expert_parallel divides experts that are not trained; take the section out of the "
            "DeepSpeed config, or the experts out of options.freeze"
        )
    return build_optimizer(task, optim, [group for group in split if group["params"]])


def _restore_buffers(module: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Undo the cast of buffers to 16 bits: statistics and codebooks need fp32."""
    for name, buffer in buffers.items():
        expert_parallel.buffer_owner(module, name)._buffers[name.rpartition(".")[2]] = buffer


def _undo_warm_up_step(optimizer: Any) -> None:
    """DeepSpeed's 16-bit optimizer without ZeRO allocates its state by a step with zero gradients.

    That step counts for Adam's bias correction (the first real updates would be a quarter too small)
    and decays the fp32 copies: forget it, and copy the weights again.
    """
    optimizer.optimizer.state.clear()
    optimizer.refresh_fp32_params()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Run the block inside a process group of all ranks: NCCL on GPUs, gloo on CPUs."""
    # DeepSpeed still calls collectives by names that torch has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    add_interpreter_folder(os.environ)
    missing = missing_for_compiling(os.environ) if device.type == "cpu" else None
    if missing is not None:
        logger.warning("DeepSpeed's shared-memory op needs %s; gloo alone is slower", missing)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet_deepspeed():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":
        release_names(os.environ)
    try:
        yield
    finally:
        deepspeed.comm.destroy_process_group()


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Keep DeepSpeed's start-up log out of the progress output; warnings stay."""
    from deepspeed.utils import logger as deepspeed_logger

    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        deepspeed_logger.setLevel(level)
