"""Memory growth of the loader over many epochs.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --data data/sample --json benchmarks/results/soak.json

For each stage, one loader with worker processes iterates over all epochs as in training; batches are
discarded. After each epoch, records the unshared memory (USS, from /proc/PID/smaps_rollup) and open files of
this process and each worker. Growth is the slope of a linear fit from the fifth epoch on, when caches are
full, times the number of epochs. A stage is stable if no process grows by more than --bound-mb or has more
open files than at the fifth epoch.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from muomni.config.loading import resolve
from muomni.distributed.discovery import Ranks
from muomni.errors import ConfigError, exit_on_error

_FIRST_EPOCH = 5
_STAGES = "thinker,audio_encoder,vision_encoder"


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="nano")
    flags.add_argument("--stages", default=_STAGES)
    flags.add_argument("--epochs", type=int, default=50)
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--bound-mb", type=float, default=8.0)
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with exit_on_error("soak"):
        if arguments.epochs <= _FIRST_EPOCH + 1:
            raise ConfigError(
                f"--epochs must be greater than {_FIRST_EPOCH + 1} to fit a slope, got {arguments.epochs}"
            )
        results = {stage: soak(stage, arguments) for stage in arguments.stages.split(",")}
    print(f"{'stage':16}{'process':>10}{'MB':>9}{'growth, MB':>11}{'files':>12}")
    for stage, row in results.items():
        for name, process in row["processes"].items():
            files = "{} -> {}".format(*process["open_files"])
            print(
                f"{stage:16}{name:>10}{process['uss_mb'][-1]:>9.1f}{process['growth_mb']:>11.2f}{files:>12}"
            )
        print(f"{stage:16}{'stable' if row['is_stable'] else 'GROWS':>10}")
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("epochs", "workers", "bound_mb")}
        content = {"stages": results, **settings, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def soak(stage_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory and open files of each process after each epoch of one stage."""
    from muomni.data.loading.loader import Loader, PlannedDataset
    from muomni.training.session import Request, prepare

    config = resolve(stage_name, arguments.preset, None, {"data": {"root": arguments.data}})
    session = prepare(Request(config, Path(), Path(), {}, "never"), Ranks())
    plan = session.planned.plan
    loader = Loader(
        PlannedDataset(session.planned.source, session.stage.view(), config.seed),
        plan.rank_batches(0, 0, 1),
        arguments.workers,
        config.data.prefetch,
    )
    batches = iter(loader)
    pids: dict[str, int] = {}
    memory: dict[str, list[float]] = {}
    files: dict[str, list[int]] = {}
    step = 0
    for epoch in range(1, arguments.epochs + 1):
        num_batches = sum(plan.num_micro_batches(s, 1) for s in range(step, plan.num_steps(epoch)))
        for _ in itertools.islice(batches, num_batches):
            continue
        step = plan.num_steps(epoch)
        pids = pids or _pids()
        for name, pid in pids.items():
            memory.setdefault(name, []).append(_uss_mb(pid))
            files.setdefault(name, []).append(len(os.listdir(f"/proc/{pid}/fd")))
    processes = {
        name: {
            "growth_mb": round(growth(memory[name]), 3),
            "open_files": [files[name][_FIRST_EPOCH - 1], files[name][-1]],
            "uss_mb": [round(value, 2) for value in memory[name]],
        }
        for name in pids
    }
    is_stable = all(
        process["growth_mb"] <= arguments.bound_mb
        and process["open_files"][1] <= process["open_files"][0]
        for process in processes.values()
    )
    return {"is_stable": is_stable, "processes": processes}


def _pids() -> dict[str, int]:
    """Process ids of this process and its current workers."""
    workers = sorted(child.pid for child in multiprocessing.active_children() if child.pid)
    return {"main": os.getpid(), **{f"worker {i}": pid for i, pid in enumerate(workers)}}


def _uss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private_kb = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(private_kb) / 1024


def growth(values: list[float]) -> float:
    """Growth of a linear fit to the values from the fifth on."""
    late = values[_FIRST_EPOCH - 1 :]
    slope = np.polyfit(np.arange(len(late)), late, 1)[0]
    return float(slope) * (len(late) - 1)


if __name__ == "__main__":
    main()
