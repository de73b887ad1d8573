"""Overhead of muomni's training loop over a bare DeepSpeed loop with the same model and batches.

    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 benchmarks/step_overhead.py --data data/sample

Both loops run in one process and alternate in rounds of steps, so that noise of the machine affects both.
The bare loop has its batches in memory; muomni reads, decodes, and packs them, reduces loss denominators over
ranks, and logs to metrics.jsonl and MLflow. Reports the median over rounds of the ratio, which varies by
several percent between runs of a dozen rounds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from benchmarks.turns import steps_of, take_turns, training_loops
from muomni.config.loading import parse_override, resolve
from muomni.config.names import ENGINES
from muomni.data.loading.loader import PlannedDataset
from muomni.distributed.discovery import discover, export_environment


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="nano")
    flags.add_argument("--zero", type=int, default=1)
    flags.add_argument("--rounds", type=int, default=60)
    flags.add_argument("--steps", type=int, default=10, help="steps per round")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    ranks = discover()
    export_environment(ranks, os.environ)

    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.engine.process_group import process_group
    from muomni.training.session import Request, open_loop, prepare

    num_steps = arguments.rounds * arguments.steps + arguments.steps
    changes = {**parse_override("training.max_epochs=null")["training"], "max_steps": num_steps}
    config = resolve(
        "thinker", arguments.preset, None,
        {"data": {"root": arguments.data}, "training": changes},
    )  # fmt: skip
    engine_json = read_engine_json(ENGINES / f"zero{arguments.zero}.json")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        session = prepare(Request(config, run, run, engine_json, "never"), ranks)
        with process_group(session.device):
            result = compare(open_loop(session), bare_loop(session, arguments.steps), arguments)
    if ranks.is_main:
        # Without paths, which are specific to one machine.
        settings = {name: vars(arguments)[name] for name in ("preset", "zero", "rounds", "steps")}
        result |= {"settings": settings, "machine": machine_facts()}
        result["ranks"] = ranks.world_size
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(
            json.dumps({key: result[key] for key in ("overhead_percent", "bare_ms", "muomni_ms")})
        )


def bare_loop(session: Any, num_steps: int) -> Callable[[], None]:
    """Return a function that runs `num_steps` steps of plain DeepSpeed on batches in memory."""
    import deepspeed

    from muomni.training.engine import ds_config
    from muomni.training.engine.deepspeed_quirks import quiet_deepspeed
    from muomni.training.optim.groups import build_optimizer

    config, stage = session.request.config, session.stage
    task = stage.build()
    full = ds_config.complete(
        session.request.engine_json, config, session.precision, session.feed.accumulates,
        session.ranks.world_size,
    )  # fmt: skip
    with quiet_deepspeed():
        engine, *_ = deepspeed.initialize(
            model=task, optimizer=build_optimizer(task, config.optim), config=full
        )
    dataset = PlannedDataset(session.planned.source, stage.view(), config.seed)
    plan = session.planned.plan.rank_batches(0, session.ranks.rank, session.ranks.world_size)
    batches = []
    for _ in range(num_steps * session.feed.num_micro_batches(0)):
        batch = dataset[next(plan)].tensors
        batches.append((batch, float(stage.loss_denominators(batch)["loss"])))

    def run() -> None:
        for batch, weight in batches:
            loss = engine(batch).losses["loss"] / weight
            engine.backward(loss)
            engine.step()

    return run


def compare(loop: Any, bare: Callable[[], None], arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both loops in turn; the first round of each is a warm-up."""
    with training_loops([loop]):
        variants = {"bare": bare, "muomni": steps_of(loop, arguments.steps)}
        times = take_turns(variants, arguments.rounds, arguments.steps)
    ratios = [own / bare_ms for own, bare_ms in zip(times["muomni"], times["bare"], strict=True)]
    return {
        "overhead_percent": round(100 * (statistics.median(ratios) - 1), 2),
        "overhead_percent_of_minima": round(
            100 * (min(times["muomni"]) / min(times["bare"]) - 1), 2
        ),
        "bare_ms": round(statistics.median(times["bare"]), 2),
        "muomni_ms": round(statistics.median(times["muomni"]), 2),
        "rounds_ms": times,
    }


if __name__ == "__main__":
    main()
