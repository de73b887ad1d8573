"""Every private name and undocumented behavior of DeepSpeed that this project relies on.

Written against DeepSpeed 0.19.8; pyproject.toml pins `deepspeed>=0.19.8,<0.20`. Check each function here
before raising the pin. tests/test_import_rules.py keeps these names out of all other files. DeepSpeed is
imported where it is needed, since code that only asks for shapes runs without it.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muomni.io.logs import is_verbose
from muomni.observe.step_clock import StepClock

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# One of four unrelated wrapper classes (ZeRO 1-2, ZeRO-3, fp16, bf16), or the given optimizer itself.
DeepSpeedOptimizer = Any


# -- start-up --------------------------------------------------------------------------------------
@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Hide DeepSpeed's start-up log unless output is verbose; warnings stay."""
    from deepspeed.utils import logger
    from deepspeed.utils.logging import set_log_level_from_string

    level = logging.getLevelName(logger.level).lower()
    set_log_level_from_string("info" if is_verbose() else "warning")
    try:
        yield
    finally:
        set_log_level_from_string(level)


def log_prints_of_start() -> None:
    """Log what DeepSpeed prints when its shared-memory op is ready, instead of printing it on every rank."""
    from deepspeed.utils import logger

    backend: Any = import_module("deepspeed.comm.torch")  # `deepspeed.comm` has torch by that name
    backend.print = logger.info


def ignore_deprecated_collectives() -> None:
    """Hide warnings about torch.distributed names that DeepSpeed calls; users cannot act on them."""
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed from building its shared-memory op: it fails with a compiler traceback."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def allow_fp16_on_cpu() -> None:
    """CPUs compute fp16 slowly but correctly; DeepSpeed rejects it unless its accelerator claims support."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True


# -- gradients and optimizer step ------------------------------------------------------------------
def leaves_loss_unscaled(zero_stage: int, precision: str) -> bool:
    """Whether the caller must apply the loss scale: fp16 without ZeRO divides gradients by it only."""
    return zero_stage == 0 and precision == "fp16"


def skip_reduction_on_one_rank(engine: "DeepSpeedEngine", optimizer: DeepSpeedOptimizer) -> None:
    """Replace the gradient reduction, which copies all gradients to a buffer and back, by its side effect.

    That is a zero gradient for weights without one, so that AdamW decays them, too.
    """

    def fill_missing_gradients(grads: object = None, elements_per_buffer: int = 0) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)

    engine.buffered_allreduce_fallback = fill_missing_gradients


def time_gradient_reduction(engine: "DeepSpeedEngine", clock: StepClock) -> None:
    """Attribute the reduction at the end of `backward` to the section `communication` of `clock`."""
    reduce = engine.allreduce_gradients

    def timed_reduce(*args: Any, **kwargs: Any) -> None:
        with clock.section("communication"):
            reduce(*args, **kwargs)

    engine.allreduce_gradients = timed_reduce


def weight_pairs(optimizer: DeepSpeedOptimizer) -> list[tuple[list[Any], list[Tensor]]]:
    """The trained 16-bit weights of each group and their fp32 counterparts, without ZeRO."""
    return list(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True))


def undo_warm_up_step(optimizer: DeepSpeedOptimizer) -> None:
    """Forget the step with zero gradients by which the 16-bit optimizers without ZeRO allocate state.

    It would count for Adam's bias correction (making the first real updates a quarter too small) and
    decay the master weights.
    """
    optimizer.optimizer.state.clear()
    optimizer.refresh_fp32_params()


def tolerate_min_loss_scale(optimizer: DeepSpeedOptimizer) -> None:
    """ZeRO's fp16 optimizers would raise mid-step at the smallest scale; `Guard` decides instead."""
    optimizer.loss_scaler.raise_error_at_min_scale = False


def set_accumulation_boundary(
    engine: "DeepSpeedEngine", optimizer: DeepSpeedOptimizer, is_last: bool
) -> None:
    """Tell engine and optimizer whether this micro-batch is the last of a step.

    DeepSpeed counts to a fixed number, and tells ZeRO optimizers by hooks on output tensors, which it does
    not find in a StageOutput; offload would then take the first micro-batch for the last.
    """
    engine._is_gradient_accumulation_boundary = is_last
    if hasattr(optimizer, "set_gradient_accumulation_boundary"):  # ZeRO 1 to 3
        optimizer.set_gradient_accumulation_boundary(is_last)


# Settings of loss scaling that DeepSpeed saves and restores; its classes name the smallest scale differently.
_SCALER_SETTINGS = (
    "scale_factor", "scale_window", "min_scale", "min_loss_scale", "delayed_shift",
    "consecutive_hysteresis", "raise_error_at_min_scale",
)  # fmt: skip


def optimizer_settings(optimizer: DeepSpeedOptimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Clipping, and the rules of loss scaling, which DeepSpeed saves and restores with the state."""
    names = ["clip_grad"] if hasattr(optimizer, "clip_grad") else []
    scaler = _loss_scaler(optimizer)
    return (
        {name: getattr(optimizer, name) for name in names},
        {name: getattr(scaler, name) for name in _SCALER_SETTINGS if hasattr(scaler, name)},
    )


def set_optimizer_settings(
    optimizer: DeepSpeedOptimizer, settings: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Inverse of `optimizer_settings`, for after a checkpoint was loaded."""
    for owner, values in zip((optimizer, _loss_scaler(optimizer)), settings, strict=True):
        for name, value in values.items():
            setattr(owner, name, value)


def _loss_scaler(optimizer: DeepSpeedOptimizer) -> Any:
    """What holds the rules of loss scaling; without ZeRO, its name differs."""
    return getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))


def loss_scale(optimizer: DeepSpeedOptimizer) -> float:
    """The current loss scale, which the fp16 optimizer without ZeRO names `cur_scale`."""
    return float(getattr(optimizer, "cur_scale", getattr(optimizer, "loss_scale", 1.0)))


def has_fp32_sums(optimizer: DeepSpeedOptimizer) -> bool:
    """Whether this is DeepSpeed's separate optimizer of ZeRO 1 for bf16 weights and fp32 gradients."""
    return hasattr(optimizer, "fp32_groups_flat_partition")


# -- weights ---------------------------------------------------------------------------------------
def master_weights(optimizer: DeepSpeedOptimizer, zero_stage: int) -> list[Tensor]:
    """The fp32 weights that this rank's optimizer updates; a flat shard of them under ZeRO."""
    if zero_stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if has_fp32_sums(optimizer):
        return list(optimizer.fp32_groups_flat_partition)
    if zero_stage:
        return list(optimizer.single_partition_of_fp32_groups)
    return [p for group in optimizer.param_groups for p in group["params"]]


def copy_masters_to_model(optimizer: DeepSpeedOptimizer, zero_stage: int, precision: str) -> None:
    """Copy master weights to the model, as the end of a step does; DeepSpeed has no public call for it."""
    if zero_stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif zero_stage:
        optimizer.update_lp_params()
    elif precision != "fp32":
        for shorts, fulls in weight_pairs(optimizer):
            for parameter, master in zip(shorts, fulls, strict=True):
                parameter.data.copy_(master.data)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter before ZeRO-3 partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def local_elements(parameter: nn.Parameter) -> Tensor:
    """A parameter, or under ZeRO-3 this rank's shard without the uninitialized padding at its end."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    sharded: Any = parameter
    size = sharded.ds_tensor.numel()
    num_left = sharded.ds_numel - sharded.ds_zero_partition_rank * size
    return sharded.ds_tensor[: max(0, min(size, num_left))]


# -- AutoEP ----------------------------------------------------------------------------------------
def is_expert_parallel(module: nn.Module) -> bool:
    """Whether AutoEP put this layer in place of a `MoEBlock`."""
    return getattr(module, "_is_autoep_layer", False)


def expert_group(layer: nn.Module) -> dist.ProcessGroup:
    """The ranks that share the experts of an expert-parallel layer."""
    layer_of_autoep: Any = layer
    return layer_of_autoep.ep_group
