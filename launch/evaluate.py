"""Evaluate one stage on held-out data: `deepspeed launch/evaluate.py --stage STAGE --run DIR`.

Prints each metric next to a trivial baseline fitted on the training split. The last line of stdout is
one JSON object with the same metrics. Runs under deepspeed, torchrun, srun, and plain python; the metrics
do not depend on the number of ranks.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.config.run import STAGE_NAMES
from muomni.distributed.discovery import discover
from muomni.errors import exit_on_error
from muomni.evaluation.report import REPORT_NAME
from muomni.evaluation.request import EvaluationRequest


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--stage", required=True, help=f"one of {', '.join(STAGE_NAMES)}")
    flags.add_argument("--run", type=Path, required=True, help="run folder with the export")
    flags.add_argument("--data", help="data root or URL (default: the training data of the run)")
    flags.add_argument("--split", default="test", help="split to evaluate (default: test)")
    flags.add_argument(
        "--json",
        type=Path,
        help=f"report file (default: RUN/STAGE/{REPORT_NAME} for full test splits)",
    )
    flags.add_argument("--limit", type=int, help="evaluate the first N samples only")
    flags.add_argument("--upstream", type=Path, help="run that the stage was trained from")
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return flags


def main() -> None:
    arguments = parser().parse_args()
    ranks = discover()
    # Every rank raises the same error; one message is enough.
    with exit_on_error("evaluate", is_main=ranks.is_main):
        logging.basicConfig(
            level=logging.WARNING if ranks.is_main else logging.ERROR, format="%(message)s"
        )
        request = EvaluationRequest(
            arguments.stage, arguments.run, arguments.data, arguments.upstream, arguments.split,
            arguments.limit,
        )  # fmt: skip
        from muomni.evaluation.evaluator import evaluate

        report = evaluate(request, ranks, arguments.json)
        if ranks.is_main:
            print(json.dumps(report.to_json()), flush=True)


if __name__ == "__main__":
    main()
