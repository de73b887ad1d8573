"""Facts about the machine of a benchmark, for its result file."""

import os
import platform
from pathlib import Path
from typing import Any

from muomni.run_folder import provenance


def machine_facts() -> dict[str, Any]:
    """CPU, available cores, threads per rank, GPU, and package versions."""
    import torch

    cpu = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        **provenance(),
    }
