"""Weak scaling from one rank to two on one machine, with one core per rank.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --data data/sample --json result.json

Stage thinker with the same micro-batch on each rank, so two ranks process twice the tokens per step. Launches
of one rank and two alternate, --launches times each. In each launch, the full training loop alternates with
a bare DeepSpeed loop over the same batches in memory (that of step_overhead.py). `scaling` compares the
fastest rounds of all launches, which are least affected by other processes; `of_medians` the medians.

A launch takes about 40 s, and all launches about 10 minutes with the defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from benchmarks.turns import steps_of, take_turns, training_loops
from muomni.config.loading import resolve
from muomni.config.names import ENGINES
from muomni.distributed.discovery import Ranks, discover, export_environment

# Sequences and positions of a rank's micro-batch, one per step.
LOADS = {"4x512": (4, 512), "1x128": (1, 128)}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="tiny")
    flags.add_argument("--loads", nargs="+", default=list(LOADS), choices=LOADS)
    flags.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3))
    flags.add_argument("--launches", type=int, default=3, help="launches per number of ranks")
    flags.add_argument("--rounds", type=int, default=8, help="rounds per launch")
    flags.add_argument("--steps", type=int, default=10, help="steps per round")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.worker is not None:
        measure_ranks(arguments)
        return
    start = time.perf_counter()
    result: dict[str, Any] = {
        load: scaling([launch(arguments, load, ranks) for ranks in order(arguments.launches)])
        for load in arguments.loads
    }
    names = ("preset", "zero", "launches", "rounds", "steps")
    result["settings"] = {name: vars(arguments)[name] for name in names}
    result["machine"] = machine_facts()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for load in arguments.loads:
        print(json.dumps({load: {n: v for n, v in result[load].items() if n != "launches"}}))
    print(f"took {time.perf_counter() - start:.0f} s")


def order(num_launches: int) -> list[int]:
    """Return the numbers of ranks to launch: 1, 2, 2, 1, 1, 2, ..."""
    pairs = [(1, 2) if number % 2 == 0 else (2, 1) for number in range(num_launches)]
    return [ranks for pair in pairs for ranks in pair]


def launch(arguments: argparse.Namespace, load: str, num_ranks: int) -> dict[str, Any]:
    """Return the measurement of `num_ranks` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        command = [
            "deepspeed", "--num_gpus", str(num_ranks), __file__, "--worker", str(result_file),
            "--loads", load, "--data", arguments.data, "--preset", arguments.preset,
            "--zero", str(arguments.zero), "--rounds", str(arguments.rounds),
            "--steps", str(arguments.steps),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not result_file.is_file():
            raise SystemExit(f"launching {num_ranks} ranks failed:\n{done.stderr[-4000:]}")
        result = json.loads(result_file.read_text(encoding="utf-8"))
    print(f"{load}, {num_ranks} ranks: {min(result['ms']['muomni']):.1f} ms per step", flush=True)
    return result


def scaling(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """Throughput of two ranks relative to one, for muomni and the bare loop."""
    result: dict[str, Any] = {}
    for variant in ("muomni", "bare"):
        times = {
            ranks: [ms for run in launches if run["ranks"] == ranks for ms in run["ms"][variant]]
            for ranks in (1, 2)
        }
        result[variant] = {
            "scaling": round(2 * min(times[1]) / min(times[2]), 3),
            "of_medians": round(2 * statistics.median(times[1]) / statistics.median(times[2]), 3),
            "minimum_ms": {ranks: round(min(values), 2) for ranks, values in times.items()},
        }
    return {**result, "launches": launches}


def measure_ranks(arguments: argparse.Namespace) -> None:
    """Entry point of a rank: measure the training loop and the bare loop in turn."""
    from benchmarks.step_overhead import bare_loop
    from muomni.training.engine.process_group import process_group
    from muomni.training.session import open_loop

    ranks = discover()
    export_environment(ranks, os.environ)
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(arguments, Path(folder), ranks)
        with process_group(session.device):
            loop, bare = open_loop(session), bare_loop(session, arguments.steps)
            with training_loops([loop]):
                variants = {"bare": bare, "muomni": steps_of(loop, arguments.steps)}
                times = take_turns(variants, arguments.rounds, arguments.steps)
    if ranks.is_main:
        result = {"ranks": ranks.world_size, "ms": times}
        arguments.worker.write_text(json.dumps(result), encoding="utf-8")


def open_session(arguments: argparse.Namespace, folder: Path, ranks: Ranks) -> Any:
    """Open stage thinker with this load per rank."""
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.session import Request, prepare

    rows, size = LOADS[arguments.loads[0]]
    num_steps = (arguments.rounds + 1) * arguments.steps
    config = resolve(
        "thinker", arguments.preset, None,
        {
            "data": {"root": arguments.data},
            "precision": "fp32",
            "batch": {
                "seq_len": size,
                "global_tokens": size * rows * ranks.world_size,
                "micro_sequences": rows,
            },
            "training": {"max_steps": num_steps, "max_epochs": None},
        },
    )  # fmt: skip
    engine_json = read_engine_json(ENGINES / f"zero{arguments.zero}.json")
    run = folder / "run"
    return prepare(Request(config, run, run, engine_json, "never"), ranks)


if __name__ == "__main__":
    main()
