"""Utilization: the right peak or none, and the formula with its numbers."""

import pytest
import torch

from muomni.observe.peak_flops import Peak, find_peak, named_peak
from muomni.observe.utilization import Utilization


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494.7),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 66.9),
        ("NVIDIA H100 PCIe", "bf16", False, 756.0),
        ("NVIDIA A100-SXM4-80GB", "fp16", False, 312.0),
        ("A100-SXM4-40GB", "bf16", False, 312.0),
        ("NVIDIA A10", "bf16", False, 125.0),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125.0),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),
    ],
)
def test_known_devices(name: str, precision: str, tf32: bool, tflops: float) -> None:
    peak, _ = named_peak(name, precision, tf32)
    assert peak is not None
    assert peak.flop_per_s == tflops * 1e12
    assert name in peak.source


@pytest.mark.parametrize(
    ("name", "precision", "why"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", "MIG"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", "Laptop"),
        ("Tesla T4", "bf16", "has no bf16"),
    ],
)
def test_an_unlisted_device_has_no_peak(name: str, precision: str, why: str) -> None:
    peak, reason = named_peak(name, precision, allows_tf32=False)
    assert peak is None
    assert why in reason


def test_a_cpu_has_the_configured_peak_or_none() -> None:
    peak, reason = find_peak(torch.device("cpu"), "fp32", None)
    assert peak is None
    assert "CPU" in Utilization(1, peak, reason).describe()
    assert "training.peak_tflops" in Utilization(1, peak, reason).describe()
    peak, _ = find_peak(torch.device("cpu"), "fp32", 0.5)
    assert peak == Peak(5e11, "training.peak_tflops")


def test_metrics_match_the_formula() -> None:
    utilization = Utilization(4, Peak(100e12, "a device"), "")
    metrics = utilization.take(10, 10, model=200e12, hardware=300e12, seconds=2.0)
    assert metrics == pytest.approx(
        {"mfu": 0.25, "hfu": 0.375, "model_tflop_per_s": 25.0, "hardware_tflop_per_s": 37.5}
    )
    assert "4 devices x 100e12 FLOP/s of a device" in utilization.describe()


def test_without_a_peak_only_rates_are_reported() -> None:
    metrics = Utilization(1, None, "no reason").take(1, 1, 1e12, 2e12, 1.0)
    assert metrics == {"model_tflop_per_s": 1.0, "hardware_tflop_per_s": 2.0}


def test_the_summary_drops_the_first_logged_steps() -> None:
    utilization = Utilization(1, Peak(10e12, "a device"), "")
    assert utilization.summary() == ("", {})
    utilization.take(10, 10, 10e12, 10e12, 100.0)
    assert utilization.summary()[1]["mfu"] == pytest.approx(0.01)  # the only steps so far
    for step in (20, 30):
        utilization.take(step, 10, 10e12, 20e12, 2.0)
    text, metrics = utilization.summary()
    assert metrics["mfu"] == pytest.approx(0.5)
    assert metrics["hfu"] == pytest.approx(1.0)
    assert metrics["step_time_s"] == pytest.approx(0.2)
    assert text.startswith("steps 11 to 30: 0.2 s per step")
    assert "MFU 50.00 %, HFU 100.00 %" in text
    assert "2e+13 and 4e+13 FLOP / (4 s x 1 devices x 10e12 FLOP/s of a device)" in text
