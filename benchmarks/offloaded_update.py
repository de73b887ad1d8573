"""Optimizer step of offloaded weights on the CPU: torch AdamW (fused and unfused) and DeepSpeed CPUAdam.

    OMP_NUM_THREADS=1 python benchmarks/offloaded_update.py --json benchmarks/results/offloaded_update.json

Minimum over several steps on one flat fp32 tensor, as in ZeRO. CPUAdam is compiled at first use.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts

NUM_UPDATES = 8


def update_s(make: Callable[..., torch.optim.Optimizer], num_elements: int) -> float:
    """Seconds of the fastest step."""
    weight = torch.nn.Parameter(torch.randn(num_elements))
    weight.grad = torch.randn(num_elements)
    optimizer = make([weight], lr=1e-3)
    optimizer.step()  # allocates the optimizer state
    times = []
    for _ in range(NUM_UPDATES):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=50_000_000)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    makers: dict[str, Callable[..., Any]] = {
        "torch AdamW, fused": partial(torch.optim.AdamW, fused=True),
        "torch AdamW, not fused": torch.optim.AdamW,
        "DeepSpeedCPUAdam": partial(DeepSpeedCPUAdam, adamw_mode=True),
    }
    seconds = {name: update_s(make, arguments.elements) for name, make in makers.items()}
    result = {
        "machine": machine_facts(),
        "elements": arguments.elements,
        "update_s": seconds,
    }
    for name, value in seconds.items():
        print(f"{name:24} {value * 1e3:8.1f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
