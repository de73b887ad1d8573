"""Padding efficiency of batching, and load imbalance between ranks.

    OMP_NUM_THREADS=1 python benchmarks/padding.py --data data/sample --json result.json

useful: real length / padded length (bucketed: count times longest; packed: sequences times capacity).
wait: largest / mean padded length of the micro-batches of a step, minus one.
Lengths are those of the sample data and synthetic ones: utterances as in LibriSpeech (mostly 10 to 16 s),
and documents with a log-normal distribution (mean of about 510 tokens), truncated to the context.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from muomni.errors import exit_on_error

_NUM_SAMPLED = 400_000


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="nano")
    flags.add_argument("--steps", type=int, default=60, help="number of steps to analyze")
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with exit_on_error("padding"):
        results = {**of_sample_data(arguments), **of_synthetic_lengths(arguments.steps)}
    print(f"{'':46}{'useful':>8}{'mean wait':>11}{'waits > 10 %':>14}")
    for name, row in results.items():
        print(
            f"{name:46}{row['useful']:>8.4f}{row['wait_mean']:>11.4f}{row['waits_over_tenth']:>14.4f}"
        )
    if arguments.json:
        content = {"plans": results, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def of_sample_data(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Plans of the preset; these corpora are smaller than one shuffle window."""
    from muomni.config.loading import resolve
    from muomni.distributed.discovery import Ranks
    from muomni.training.session import Request, prepare

    results = {}
    for stage in ("audio_encoder", "thinker"):
        config = resolve(stage, arguments.preset, None, {"data": {"root": arguments.data}})
        session = prepare(Request(config, Path(), Path(), {}, "never"), Ranks())
        name = f"sample {stage}, {session.planned.plan.order.epoch_size} samples"
        results[name] = metrics(session.planned.plan, session.planned.plan.num_steps(1), 1)
    return results


def of_synthetic_lengths(num_steps: int) -> dict[str, dict[str, float]]:
    """Plans of synthetic speech and text lengths."""
    from muomni.data.sampling.plan import Batching, Plan

    random = np.random.default_rng(0)
    seconds = np.clip(17 - random.gamma(2.0, 2.5, _NUM_SAMPLED), 1.2, 17)
    frames = np.ceil(100 * seconds).astype(np.int64)
    tokens = np.clip(random.lognormal(5.85, 0.9, _NUM_SAMPLED), 8, 4096).astype(np.int64)
    results = {}
    for group in (8, 64, 512):  # ranks, with one micro-batch per step each
        for budget_s in (100, 200, 400):
            plan = Plan(frames, Batching("bucket", group * budget_s * 100, budget_s * 100), 0)
            results[f"speech {budget_s} s, G={group}"] = metrics(plan, num_steps, group)
        for rows in (1, 8):
            plan = Plan(tokens, Batching("pack", group * rows, rows, seq_len=4096), 0)
            results[f"text {rows} x 4096 tokens, G={group}"] = metrics(plan, num_steps, group)
    return results


def metrics(plan: Any, num_steps: int, num_ranks: int) -> dict[str, float]:
    """Useful fraction and waits over the first `num_steps` steps, at most one epoch."""
    real, padded, waits = 0, 0, []
    for step in range(min(num_steps, plan.num_steps(1))):
        costs = []
        shares = [plan.rank_step(step, rank, num_ranks) for rank in range(num_ranks)]
        for batch in itertools.chain(*shares):
            lengths = plan.lengths[np.array(batch.ids)]
            if plan.batching.mode == "pack":
                cost = len(batch.sequences) * plan.batching.seq_len
            else:
                cost = len(lengths) * int(lengths.max())
            real += int(lengths.sum())
            costs.append(cost)
        padded += sum(costs)
        waits.append(max(costs) / np.mean(costs) - 1)
    return {
        "useful": round(real / padded, 5),
        "wait_mean": round(float(np.mean(waits)), 5),
        "waits_over_tenth": round(float(np.mean(np.array(waits) > 0.1)), 5),
    }


if __name__ == "__main__":
    main()
