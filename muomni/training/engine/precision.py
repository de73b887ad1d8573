"""Choice of the device and of the floating-point format."""

import os

import torch

from muomni.config.run import Precision, RunConfig
from muomni.distributed.devices import check_gpus_usable, uses_cpu
from muomni.errors import ConfigError, MachineError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU if there is none or DS_ACCELERATOR=cpu is set.

    Raises MachineError if there are GPUs that torch cannot use, or fewer than ranks.
    """
    if uses_cpu(os.environ):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        check_gpus_usable(os.environ)
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise MachineError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible "
            f"(CUDA_VISIBLE_DEVICES={visible}); start fewer ranks per node"
        )
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    _try_device(device)
    return device


def _try_device(device: torch.device) -> None:
    """Raise MachineError if a visible GPU does not compute."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise MachineError(
            f"GPU {device.index} is visible but unusable ({reason}); see nvidia-smi, or leave it out of "
            f"CUDA_VISIBLE_DEVICES"
        ) from None


def pick_precision(wanted: Precision, device: torch.device) -> str:
    """Resolve `auto`: bf16 if the GPU supports it, else fp16; fp32 on CPUs.

    Raises ConfigError for a precision that the device does not support.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "auto":
            return "bf16" if has_bf16 else "fp16"
        if wanted == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"{name} does not compute in bf16; use --precision fp16 or fp32")
        return wanted
    # Small models on a CPU spend little time in matmuls; elsewhere bf16 is slower.
    return "fp32" if wanted == "auto" else wanted


def use_tf32(wanted: bool, precision: str, device: torch.device) -> None:
    """Use TF32 (10-bit mantissa) for fp32 matmuls and convolutions on GPUs, or not.

    torch's default enables it for convolutions only; runs in other precisions keep that default.
    """
    if precision == "fp32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high" if wanted else "highest")
        torch.backends.cudnn.allow_tf32 = wanted


def describe_precision(config: RunConfig, precision: str, device: torch.device) -> str:
    """Describe the precision of a run, whether `auto` chose it, and whether TF32 is on."""
    chosen = " (chosen by auto)" if config.precision == "auto" else ""
    rounding = ""
    if precision == "fp32" and device.type == "cuda":
        rounding = " with TF32" if config.tf32 else " without TF32 (tf32=true is faster)"
    return f"{precision}{rounding}{chosen} on {device.type}"
