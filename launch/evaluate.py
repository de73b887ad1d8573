"""Evaluate one stage on held-out data: `deepspeed launch/evaluate.py --stage STAGE --run DIR`.

Prints each metric beside a trivial baseline that was fitted on the training split. The last line of
standard output is one JSON object with the same metrics. Works under deepspeed, torchrun, srun and
plain python; any number of ranks gives the same metrics.
"""

import argparse
import json
import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.config.loading import did_you_mean
from muomni.config.run import STAGE_NAMES
from muomni.distributed.deepspeed_import import import_deepspeed
from muomni.distributed.discovery import Ranks, discover, export_environment
from muomni.errors import ConfigError, exit_on_error
from muomni.evaluation.report import REPORT_NAME, write_report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--stage", required=True, help=f"one of {', '.join(STAGE_NAMES)}")
    flags.add_argument("--run", type=Path, required=True, help="run folder that holds the export")
    flags.add_argument("--data", help="data root or its URL (what the run was trained on)")
    flags.add_argument("--split", default="test", help="split of the datasets (test)")
    flags.add_argument(
        "--json",
        type=Path,
        help=f"file for the metrics (RUN/STAGE/{REPORT_NAME} for whole test splits)",
    )
    flags.add_argument("--limit", type=int, help="look at the first N samples only")
    flags.add_argument("--upstream", type=Path, help="run whose exports the stage was trained from")
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return flags


def main() -> None:
    arguments = parser().parse_args()
    ranks = discover()
    # Every rank finds the same mistake; one sentence is enough.
    with exit_on_error("evaluate", is_main=ranks.is_main):
        logging.basicConfig(
            level=logging.WARNING if ranks.is_main else logging.ERROR, format="%(message)s"
        )
        result = evaluate(arguments, ranks)
        if ranks.is_main:
            print(json.dumps(result), flush=True)


def evaluate(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Check, evaluate, print the table and write the report; returns its JSON."""
    _check(arguments)
    from muomni.evaluation.context import Wanted
    from muomni.evaluation.evaluator import run_evaluation
    from muomni.training.engine.precision import pick_device

    wanted = Wanted(
        arguments.stage, arguments.run, arguments.data, arguments.upstream, arguments.split,
        arguments.limit,
    )  # fmt: skip
    device = pick_device(ranks.local_rank)
    with ExitStack() as stack:
        if ranks.world_size > 1:
            import_deepspeed()
            from muomni.training.engine.process_group import process_group

            export_environment(ranks, os.environ)
            stack.enter_context(process_group(device))
        report = run_evaluation(wanted, device)
    if ranks.is_main:
        print(report.table(), flush=True)
        path = arguments.json
        if path is None and arguments.split == "test" and arguments.limit is None:
            path = arguments.run / arguments.stage / REPORT_NAME
        if path is not None:
            write_report(path, report)
    return report.to_json()


def _check(arguments: argparse.Namespace) -> None:
    if arguments.stage not in STAGE_NAMES:
        hint = did_you_mean(arguments.stage, STAGE_NAMES)
        raise ConfigError(
            f"unknown stage '{arguments.stage}'{hint}; stages: {', '.join(STAGE_NAMES)}"
        )
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit} leaves nothing to evaluate; give at least 1")


if __name__ == "__main__":
    main()
