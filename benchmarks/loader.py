"""Data loading throughput, compared with the consumption of training.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --data data/sample --run runs/quickstart

For each stage: units per second of one process that reads, decodes, and collates, and its ratio to the
units per second that one rank consumed in the given run (median over its metrics.jsonl).
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from muomni.checkpoint.file_list import newest_complete, verify
from muomni.config.loading import resolve
from muomni.config.registry import STAGES
from muomni.distributed.discovery import Ranks
from muomni.errors import DataError, exit_on_error
from muomni.observe.metrics_log import read_lines
from muomni.run_folder import RunFolder


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="nano")
    flags.add_argument("--run", type=Path, help="finished run to compare with")
    flags.add_argument(
        "--seconds", type=float, default=5.0, help="duration of the measurement per stage"
    )
    flags.add_argument("--stages", default=",".join(STAGES))
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with exit_on_error("loader"):
        results = {stage: measure(stage, arguments) for stage in arguments.stages.split(",")}
    print(f"{'stage':16}{'unit':>10}{'delivers/s':>14}{'rank consumes/s':>20}{'ratio':>8}")
    for stage, row in results.items():
        consumed, ratio = row.get("consumed_per_s"), row.get("ratio")
        tail = f"{consumed:>20,.0f}{ratio:>8.1f}" if consumed else f"{'-':>20}{'-':>8}"
        print(f"{stage:16}{row['unit']:>10}{row['delivered_per_s']:>14,.0f}{tail}")
    if arguments.json:
        content = {"stages": results, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def num_ranks(run: Path, stage: str) -> int:
    """Number of ranks that trained a stage, from its newest checkpoint."""
    checkpoint = newest_complete(RunFolder(run, stage).checkpoints)
    if checkpoint is None:
        raise DataError(
            f"{run} has no checkpoint of stage {stage}, which records the number of ranks; rerun the stage"
        )
    return int(verify(checkpoint, with_hashes=False)["topology"]["world_size"])


def measure(stage_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Units per second of the loader of one stage, and of the run if it has the stage."""
    from muomni.data.loading.loader import Loader, PlannedDataset
    from muomni.training.session import Request, prepare

    config = resolve(stage_name, arguments.preset, None, {"data": {"root": arguments.data}})
    upstream = arguments.run or Path("runs/quickstart")
    session = prepare(Request(config, upstream, upstream, {}, "never"), Ranks())
    view = session.stage.view()
    loader = Loader(
        PlannedDataset(session.planned.source, view, config.seed),
        session.planned.plan.rank_batches(0, 0, 1),
    )
    batches = iter(loader)
    for _ in itertools.islice(batches, 3):
        continue  # warm up: open files, fill caches
    units, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < arguments.seconds:
        units += float(next(batches)["units"])
    row: dict[str, Any] = {
        "unit": view.unit,
        "delivered_per_s": units / (time.perf_counter() - start),
    }
    metrics = upstream / stage_name / "metrics.jsonl"
    if arguments.run and metrics.is_file():
        rates = [line.get(f"{view.unit}_per_s") for line in read_lines(metrics)]
        known = [rate for rate in rates if rate]
        row["consumed_per_s"] = statistics.median(known) / num_ranks(upstream, stage_name)
        row["ratio"] = row["delivered_per_s"] / row["consumed_per_s"]
    return row


if __name__ == "__main__":
    main()
