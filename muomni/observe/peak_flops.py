"""Peak rates of well-known GPUs, the denominator of utilization.

Dense metrics of the vendor's data sheets, in TFLOP/s (10^12 a second), without sparsity and with fp32
accumulation, which is what training uses. Devices are found by the exact name that their driver gives: a
variant that is not listed (other clocks, a slice of a GPU) has no peak rather than a wrong one.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class _Rates:
    """TFLOP/s of matrix products by format; None: the device lacks it."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


def _with_tensor_cores(half: float, tf32: float, fp32: float) -> _Rates:
    return _Rates(half, half, tf32, fp32)


_A100 = _with_tensor_cores(312.0, 156.0, 19.5)
_HOPPER_SXM = _with_tensor_cores(989.4, 494.7, 66.9)
_V100_SXM2 = _Rates(None, 125.0, None, 15.7)

# By name without the vendor's prefix.
_RATES = {
    "GB200": _with_tensor_cores(2500.0, 1250.0, 80.0),
    "B200": _with_tensor_cores(2250.0, 1125.0, 75.0),
    "H200": _HOPPER_SXM,
    "H200 NVL": _with_tensor_cores(835.5, 417.5, 60.0),
    "H100 80GB HBM3": _HOPPER_SXM,
    "H100 NVL": _with_tensor_cores(835.5, 417.5, 60.0),
    "H100 PCIe": _with_tensor_cores(756.0, 378.0, 51.0),
    "GH200 480GB": _HOPPER_SXM,
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "A40": _with_tensor_cores(149.7, 74.8, 37.4),
    "A30": _with_tensor_cores(165.0, 82.0, 10.3),
    "A10": _with_tensor_cores(125.0, 62.5, 31.2),
    "L40S": _with_tensor_cores(362.05, 183.0, 91.6),
    "L40": _with_tensor_cores(181.05, 90.5, 90.5),
    "L4": _with_tensor_cores(121.0, 60.0, 30.3),
    "RTX A6000": _with_tensor_cores(154.8, 77.4, 38.7),
    "RTX 6000 Ada Generation": _with_tensor_cores(364.2, 182.1, 91.1),
    "GeForce RTX 3090": _with_tensor_cores(71.0, 35.6, 35.6),
    "GeForce RTX 4090": _with_tensor_cores(165.2, 82.6, 82.6),
    "V100-SXM2-16GB": _V100_SXM2,
    "V100-SXM2-32GB": _V100_SXM2,
    "T4": _Rates(None, 65.0, None, 8.1),
}
_PREFIXES = ("NVIDIA ", "Tesla ")


@dataclass(frozen=True, slots=True)
class Peak:
    """What one device could do: FLOP/s, and where the metric is from."""

    flop_per_s: float
    source: str


def find_peak(
    device: torch.device, precision: str, given_tflops: float | None
) -> tuple[Peak | None, str]:
    """The peak of `device` in `precision` (bf16, fp16, fp32), and one sentence on why there is none.

    `given_tflops` goes before the table. Products in fp32 count as TF32 where torch is allowed it.
    """
    if given_tflops is not None:
        return Peak(given_tflops * 1e12, "training.peak_tflops"), ""
    if device.type != "cuda":
        return None, f"no peak is known of a {device.type.upper()}"
    return named_peak(torch.cuda.get_device_name(device), precision, _allows_tf32())


def named_peak(name: str, precision: str, allows_tf32: bool) -> tuple[Peak | None, str]:
    """`find_peak` of a device whose driver calls it `name`."""
    short = name
    for prefix in _PREFIXES:
        short = short.removeprefix(prefix)
    rates = _RATES.get(short)
    if rates is None:
        return None, f"the table of peaks has no '{name}'"
    kind = precision
    if precision == "fp32" and allows_tf32 and rates.tf32 is not None:
        kind = "tf32"
    rate: float | None = getattr(rates, kind)
    if rate is None:
        return None, f"{name} has no {precision}"
    return Peak(rate * 1e12, f"{name}, dense {kind}"), ""


def _allows_tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"
