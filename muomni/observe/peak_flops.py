"""Peak rates of common GPUs, the denominator of utilization.

Dense TFLOP/s (10^12 per second) of the vendor's data sheets: no sparsity, fp32 accumulation, as in training.
Devices are found by the exact name that the driver reports: an unlisted variant (other clocks, a MIG
slice) has no peak rather than a wrong one.
"""

from dataclasses import dataclass

import torch


def _rates(half: float, tf32: float, fp32: float) -> dict[str, float]:
    """TFLOP/s of matrix products by format, of a device with bf16 tensor cores."""
    return {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}


_A100 = _rates(312.0, 156.0, 19.5)
_HOPPER_SXM = _rates(989.4, 494.7, 66.9)
_V100_SXM2 = {"fp16": 125.0, "fp32": 15.7}

# By name without the vendor's prefix.
_RATES = {
    "GB200": _rates(2500.0, 1250.0, 80.0),
    "B200": _rates(2250.0, 1125.0, 75.0),
    "H200": _HOPPER_SXM,
    "H200 NVL": _rates(835.5, 417.5, 60.0),
    "H100 80GB HBM3": _HOPPER_SXM,
    "H100 NVL": _rates(835.5, 417.5, 60.0),
    "H100 PCIe": _rates(756.0, 378.0, 51.0),
    "GH200 480GB": _HOPPER_SXM,
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "A40": _rates(149.7, 74.8, 37.4),
    "A30": _rates(165.0, 82.0, 10.3),
    "A10": _rates(125.0, 62.5, 31.2),
    "L40S": _rates(362.05, 183.0, 91.6),
    "L40": _rates(181.05, 90.5, 90.5),
    "L4": _rates(121.0, 60.0, 30.3),
    "RTX A6000": _rates(154.8, 77.4, 38.7),
    "RTX 6000 Ada Generation": _rates(364.2, 182.1, 91.1),
    "GeForce RTX 3090": _rates(71.0, 35.6, 35.6),
    "GeForce RTX 4090": _rates(165.2, 82.6, 82.6),
    "V100-SXM2-16GB": _V100_SXM2,
    "V100-SXM2-32GB": _V100_SXM2,
    "T4": {"fp16": 65.0, "fp32": 8.1},
}
_PREFIXES = ("NVIDIA ", "Tesla ")


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak FLOP/s of a device, and its source."""

    flop_per_s: float
    source: str


def find_peak(
    device: torch.device, precision: str, given_tflops: float | None
) -> tuple[Peak | None, str]:
    """The peak of `device` in `precision` (bf16, fp16, fp32), or None and the reason.

    `given_tflops` overrides the table. fp32 means TF32 if torch may use it.
    """
    if given_tflops is not None:
        return Peak(given_tflops * 1e12, "training.peak_tflops"), ""
    if device.type != "cuda":
        return None, f"the peak of a {device.type.upper()} is unknown"
    allows_tf32 = torch.get_float32_matmul_precision() != "highest"
    return named_peak(torch.cuda.get_device_name(device), precision, allows_tf32)


def named_peak(name: str, precision: str, allows_tf32: bool) -> tuple[Peak | None, str]:
    """The peak of the device that its driver calls `name`; see `find_peak`."""
    short = name
    for prefix in _PREFIXES:
        short = short.removeprefix(prefix)
    rates = _RATES.get(short)
    if rates is None:
        return None, f"the peak of '{name}' is unknown"
    kind = "tf32" if precision == "fp32" and allows_tf32 and "tf32" in rates else precision
    if kind not in rates:
        return None, f"{name} has no {precision}"
    return Peak(rates[kind] * 1e12, f"{name}, dense {kind}"), ""
