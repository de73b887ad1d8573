"""`muomni compare`: metrics and configs of several runs, as a table and an HTML page with curves."""

import argparse
from pathlib import Path

from muomni.command_line import path

SUMMARY = """\
Compare runs: losses, validation and test metrics, speed, and what differs in their configs.

Prints a table per stage, and writes one HTML file with the curves of all runs; it needs no network."""
EXAMPLES = (
    "muomni compare runs/first runs/second",
    "muomni compare runs/lr-* --stage thinker --html lr.html",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the runs, the stage, and the page."""
    parser.add_argument(
        "runs", type=path, nargs="+", metavar="RUN", help="run folders, at least two"
    )
    parser.add_argument("--stage", help="one stage (default: all stages that two of the runs have)")
    parser.add_argument(
        "--html", type=path, default="compare.html", metavar="FILE",
        help="page to write (default: compare.html)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print the tables and write the page; raises ConfigError."""
    from muomni.config.registry import stage_spec
    from muomni.errors import ConfigError
    from muomni.evaluation.comparison import compare
    from muomni.evaluation.comparison_page import page
    from muomni.io.atomic_write import write_atomic

    if len(arguments.runs) < 2:
        raise ConfigError(f"compare needs at least two runs, got {arguments.runs[0]} only")
    stage = arguments.stage and stage_spec(arguments.stage).name
    stages = compare(arguments.runs, stage)
    for each in stages:
        print(f"{each.table()}\n")
    target: Path = arguments.html
    try:
        write_atomic(target, page(stages).encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {target} ({error.strerror}); choose another --html"
        ) from None
    print(f"curves: {target}")
