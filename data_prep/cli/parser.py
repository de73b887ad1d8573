"""Argument parser, argument types, and progress bar of all verbs.

The modules of this package import only the standard library and options when they are loaded, so that
`--help` is fast; a verb imports the rest when it runs.
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from muomni.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.sharding.sharder import Progress

    Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"

RENAMED_FLAGS = {
    "--licence": "--license",  # codespell:ignore licence
    "--normalise": "--normalize",  # codespell:ignore normalise
}
# Defaults that the help does not show.
_UNSET = ("None", "", "()", "False", argparse.SUPPRESS)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps texts except examples, and appends defaults to help texts."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or str(action.default) in _UNSET or "default:" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, and suggestions for unknown and renamed flags."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse arguments; raises `ConfigError` for an unknown flag before anything else is checked."""
        if self._subparsers is None:
            self._check_flags(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with one line instead of the usage."""
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _check_flags(self, arguments: Sequence[str]) -> None:
        known = self._option_string_actions
        for argument in arguments:
            if argument == "--":
                return
            flag = argument.partition("=")[0]
            if not re.match(r"--?[A-Za-z]", flag) or flag in known:
                continue
            if flag in RENAMED_FLAGS:
                raise ConfigError(f"{flag} was renamed to {RENAMED_FLAGS[flag]}")
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
            raise ConfigError(f"unknown flag {flag}; {hint}")


def add_verb(verbs: "Verbs", name: str, summary: str, examples: str, note: str = "") -> Parser:
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


def positive(text: str) -> int:
    """Argument type: a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


@contextlib.contextmanager
def open_progress(total: int | None, name: str) -> "Iterator[Progress]":
    """Show a progress bar on standard error if that is a terminal."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=name,
        unit=" samples",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    ) as bar:
        yield bar
