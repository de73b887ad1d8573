"""Choice of the device and of the floating-point format."""

import os

import torch

from muomni.config.run import Precision, RunConfig
from muomni.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU if there is none or DS_ACCELERATOR=cpu is set."""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


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
