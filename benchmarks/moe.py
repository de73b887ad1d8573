"""Throughput of a mixture of experts relative to a dense model with as many active parameters.

    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 benchmarks/moe.py --data data/sample

Runs the full training loop of stage thinker on the same batches in three variants: dense, MoE with all
experts on every rank, and MoE with AutoEP expert parallelism. The variants alternate in rounds of steps, so
that noise of the machine affects all of them. Reports medians over rounds, and the median of the per-round
ratios to dense.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from benchmarks.turns import steps_of, take_turns, training_loops
from muomni.config.loading import resolve
from muomni.config.names import ENGINES
from muomni.distributed.discovery import discover, export_environment

DENSE = "dense"


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="tiny", help="dense preset, compared with PRESET-moe")
    flags.add_argument("--zero", type=int, default=2, choices=(1, 2, 3))
    flags.add_argument("--precision", default="auto")
    flags.add_argument("--rounds", type=int, default=20)
    flags.add_argument("--steps", type=int, default=4, help="steps per round")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    ranks = discover()
    export_environment(ranks, os.environ)

    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.engine.process_group import process_group
    from muomni.training.session import Request, open_loop, prepare

    zero = f"zero{arguments.zero}"
    candidates = {
        DENSE: (arguments.preset, zero),
        "plain": (f"{arguments.preset}-moe", zero),
        "expert_parallel": (f"{arguments.preset}-moe", f"{zero}_moe"),
    }
    # Logging synchronizes the device and updates the counters, so it ends each round.
    length = {
        "max_steps": (arguments.rounds + 1) * arguments.steps,
        "max_epochs": None,
        "log_every": arguments.steps,
    }
    changes = {
        "data": {"root": arguments.data}, "precision": arguments.precision, "training": length,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, (preset, engine) in candidates.items():
            config = resolve("thinker", preset, None, changes)
            engine_json = read_engine_json(ENGINES / f"{engine}.json")
            run = Path(folder) / name
            sessions[name] = prepare(Request(config, run, run, engine_json, "never"), ranks)
        with process_group(sessions[DENSE].device):
            loops = {name: open_loop(session) for name, session in sessions.items()}
            variants = {name: steps_of(loop, arguments.steps) for name, loop in loops.items()}
            with training_loops(list(loops.values())):
                times = take_turns(variants, arguments.rounds, arguments.steps)
            units = {name: loop.state.units_seen for name, loop in loops.items()}
    if len(set(units.values())) != 1:
        raise SystemExit(f"the variants were trained on different numbers of tokens: {units}")
    if ranks.is_main:
        # Without paths, which are specific to one machine.
        names = ("preset", "zero", "precision", "rounds", "steps")
        result = {
            **summary(times, units[DENSE] / length["max_steps"]),
            "parameters": {name: parameters(preset) for name, (preset, _) in candidates.items()},
            "rounds_ms": times,
            "settings": {name: vars(arguments)[name] for name in names},
            "ranks": ranks.world_size,
            "machine": machine_facts(),
        }
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({key: result[key] for key in ("share_of_dense", "tokens_per_s")}))


def summary(times: dict[str, list[float]], tokens_per_step: float) -> dict[str, Any]:
    """Medians over rounds of the throughput, and of its per-round ratio to dense."""
    return {
        "share_of_dense": {
            name: round(
                statistics.median(d / m for d, m in zip(times[DENSE], values, strict=True)), 3
            )
            for name, values in times.items()
            if name != DENSE
        },
        "tokens_per_s": {
            name: round(1000 * tokens_per_step / statistics.median(values))
            for name, values in times.items()
        },
        "tokens_per_step": tokens_per_step,
    }


def parameters(preset: str) -> dict[str, int]:
    """Total and active parameters of the preset's Thinker with a vocabulary of 2,048."""
    from muomni.training.planning.model_counts import count_preset

    row = count_preset(preset, 2048)[0]
    return {"total": row.parameters, "active": row.active}


if __name__ == "__main__":
    main()
