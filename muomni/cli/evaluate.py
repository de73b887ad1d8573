"""`muomni evaluate`: held-out metrics of one stage; runs under deepspeed, torchrun, srun, and plain python."""

import argparse
import json
import os

from muomni.command_line import (
    CommandParser,
    add_logging_options,
    configure_logging,
    integer,
    path,
    path_or_url,
)
from muomni.config.names import recipe_names
from muomni.distributed.discovery import Ranks, discover
from muomni.distributed.launcher import start_rank
from muomni.errors import exit_on_error, exit_rank_on_error
from muomni.io.console import protect_output

SUMMARY = """\
Evaluate one stage on held-out data.

Prints each metric next to a trivial baseline fitted on the training split. The last line of standard output is
one JSON object with the same metrics. The metrics do not depend on the number of ranks."""
EXAMPLES = (
    "muomni evaluate --stage sft --run runs/first",
    "deepspeed --num_gpus 2 launch/evaluate.py --stage thinker --run runs/first --split val",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the stage, data, and report options."""
    parser.add_argument("--stage", required=True, help=f"one of {', '.join(recipe_names())}")
    parser.add_argument("--run", type=path, required=True, help="run folder with the export")
    parser.add_argument(
        "--data", type=path_or_url, help="data root or URL (default: the training data of the run)"
    )
    parser.add_argument("--split", default="test", help="split to evaluate (default: test)")
    parser.add_argument(
        "--limit", type=integer(1), metavar="N", help="evaluate the first N samples only"
    )
    parser.add_argument(
        "--upstream", type=path, help="run folder with the upstream exports (default: as recorded)"
    )
    parser.add_argument(
        "--json",
        type=path,
        help="report file (default: RUN/STAGE/evaluation.json for complete test splits)",
    )
    parser.add_argument(
        "--no-tf32",
        action="store_true",
        help="on GPUs, multiply in full fp32 instead of TF32 (slower)",
    )
    parser.add_argument("--local_rank", type=integer(-1), help=argparse.SUPPRESS)
    add_logging_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate as this process's rank; raises MuomniError."""
    ranks = discover()
    with exit_rank_on_error("muomni evaluate", ranks.rank):
        run_rank(arguments, ranks)


def main_of_rank(argv: list[str] | None = None, prog: str = "evaluate.py") -> None:
    """Entry point of launch/evaluate.py."""
    name = prog.removesuffix(".py")
    with exit_on_error(name):
        ranks = discover()
    # Every rank raises the same error; one message is enough.
    with exit_rank_on_error(name, ranks.rank):
        parser = CommandParser(prog, description=SUMMARY, examples=EXAMPLES)
        add_options(parser)
        run_rank(parser.parse_args(argv), ranks)


def run_rank(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Evaluate and print the report's JSON as the last line."""
    start_rank(ranks, os.environ)
    protect_output(None)
    configure_logging(arguments, ranks.is_main)
    from muomni.evaluation.request import EvaluationRequest

    request = EvaluationRequest(
        arguments.stage, arguments.run, arguments.data, arguments.upstream, arguments.split,
        arguments.limit, not arguments.no_tf32, arguments.quiet,
    )  # fmt: skip
    from muomni.evaluation.evaluator import evaluate

    report = evaluate(request, ranks, arguments.json)
    if ranks.is_main:
        print(json.dumps(report.to_json()), flush=True)
