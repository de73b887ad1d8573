"""Verbs and argument types of all verbs.

The modules of this package import only the standard library and options when they are loaded, so that
`--help` is fast; a verb imports the rest when it runs.
"""

import argparse
import math
import os
from typing import TYPE_CHECKING, TypeAlias

from muomni.command_line import MAX_INTEGER, CommandParser, integer, number
from muomni.errors import ConfigError

if TYPE_CHECKING:
    Verbs: TypeAlias = "argparse._SubParsersAction[CommandParser]"


positive = integer(1)
fraction = number(0, 1)
# The options of data preparation check their own limits.
any_integer = integer(-MAX_INTEGER)
any_number = number(-math.inf)


def add_verb(
    verbs: "Verbs", name: str, summary: str, examples: str, note: str = ""
) -> CommandParser:
    """Add a verb; `examples` are lines of arguments that follow the verb."""
    lines = [f"  %(prog)s {line.strip()}" for line in examples.strip().splitlines()]
    return verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.{note and ' '}{note}",
        epilog="\n".join(["examples:", *lines]),
    )


def add_workers(group: "argparse._ActionsContainer", default: int | None = None) -> None:
    """Add `--workers`, by default one per CPU."""
    group.add_argument(
        "--workers",
        type=positive,
        default=default or num_cpus(),
        metavar="N",
        help="number of worker processes" + ("" if default else " (default: one per CPU)"),
    )


def num_cpus() -> int:
    """Number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def parse_columns(text: str) -> dict[str, str]:
    """Our names and those of a table from NAME=COLUMN,...; raises `ConfigError` for anything else."""
    columns = {}
    for pair in filter(None, text.split(",")):
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--columns {text!r} is not NAME=COLUMN,...")
        columns[name.strip()] = column.strip()
    return columns
