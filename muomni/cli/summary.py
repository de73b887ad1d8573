"""`muomni summary`: table of all evaluations of a run."""

import argparse

from muomni.command_line import path

SUMMARY = (
    "Print the held-out metrics of all evaluated stages of a run and their baselines, in Markdown."
)
EXAMPLES = ("muomni summary --run runs/first", "muomni summary --run runs/first --all")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the run and which metrics to print."""
    parser.add_argument("--run", type=path, required=True, help="run folder with evaluations")
    parser.add_argument("--all", action="store_true", help="include metrics without a baseline")


def run(arguments: argparse.Namespace) -> None:
    """Print the table; raises MuomniError if nothing was evaluated."""
    from muomni.evaluation.report import read_reports, summary

    print(summary(arguments.run, read_reports(arguments.run), with_all=arguments.all))
