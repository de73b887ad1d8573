"""Which floating-point format a run uses on which device."""

import os

import torch

from muomni.config.run import Precision, RunConfig
from muomni.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def pick_precision(wanted: Precision, device: torch.device) -> str:
    """Resolve `auto`: bf16 where the device computes in it, else fp16 on GPUs and fp32 on CPUs.

    Raises ConfigError for a precision that the device lacks.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "auto":
            return "bf16" if has_bf16 else "fp16"
        if wanted == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"{name} does not compute in bf16; use --precision fp16 or fp32")
        return wanted
    # Small models on a CPU spend their time outside of matrix products, where bf16 only costs.
    return "fp32" if wanted == "auto" else wanted


def use_tf32(wanted: bool, precision: str, device: torch.device) -> None:
    """Let fp32 products and convolutions of a GPU round their factors to TF32 (10 bits), or not.

    torch's own default is half of it: convolutions do, products do not. Other runs keep that default.
    """
    if precision == "fp32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high" if wanted else "highest")
        torch.backends.cudnn.allow_tf32 = wanted


def describe_precision(config: RunConfig, precision: str, device: torch.device) -> str:
    """What `precision` a run takes on `device`, who chose it, and whether TF32 is on, in a few words."""
    chosen = " (chosen by auto)" if config.precision == "auto" else ""
    rounding = ""
    if precision == "fp32" and device.type == "cuda":
        rounding = " with TF32" if config.tf32 else " without TF32 (tf32=true is faster)"
    return f"{precision}{rounding}{chosen} on {device.type}"
