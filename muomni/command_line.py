"""The argument parser of all commands, with one-sentence errors, the types of arguments, and common options.

Must not import torch, so that `--help` is fast.
"""

import argparse
import logging
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from muomni import __version__
from muomni.errors import ConfigError, did_you_mean
from muomni.io import logs
from muomni.io.paths import absolute

# Options of earlier versions, and their new names, for the error message.
RENAMED_OPTIONS = {
    "--licence": "--license",  # codespell:ignore licence
    "--normalise": "--normalize",  # codespell:ignore normalise
    "--side-by-side": "--parallel-stages",  # terms: allow
}
_LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_INTEGER = 2**31 - 1
MAX_SEED = 2**32 - 1
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
# Defaults that the help does not show.
_UNSET = ("None", "", "()", "[]", "False", argparse.SUPPRESS)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the paragraphs of a description, keeps examples as they are, and appends defaults."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        return "\n\n".join(textwrap.fill(paragraph, width) for paragraph in paragraphs)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or str(action.default) in _UNSET or "default:" in text:
            return text
        return f"{text} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises ConfigError and suggests similar options.

    `examples` are command lines that end the help text.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **options: Any) -> None:
        if examples:
            options["epilog"] = "\n  ".join(["examples:", *examples])
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*arguments, **options, allow_abbrev=False)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse arguments; an unknown option is reported before a missing one."""
        if self._subparsers is None:
            self._check_options(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and exiting."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def takes_value(self, argument: str) -> bool:
        """Whether an argument is an option whose value is the next argument."""
        action = self._option_string_actions.get(argument)
        return action is not None and action.nargs is None

    def _check_options(self, arguments: Sequence[str]) -> None:
        known = tuple(self._option_string_actions)
        for argument in arguments:
            if argument == "--":
                return
            option = argument.partition("=")[0]
            if not re.match(r"--?[A-Za-z]", option) or option in known:
                continue
            if option in RENAMED_OPTIONS:
                raise ConfigError(f"option {option} was renamed to {RENAMED_OPTIONS[option]}")
            self.error(f"unknown option {option}{did_you_mean(option, known)}")


def integer(at_least: int = 0, at_most: int = MAX_INTEGER) -> Callable[[str], int]:
    """Argument type: an integer in decimal digits, within limits."""

    def parse(text: str) -> int:
        if not _INTEGER.fullmatch(text) or not at_least <= int(text) <= at_most:
            limits = f"of at least {at_least}" if at_most == MAX_INTEGER else ""
            limits = limits or f"from {at_least} to {at_most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer {limits}")
        return int(text)

    return parse


def number(
    at_least: float = 0.0, at_most: float = math.inf, *, above: float | None = None
) -> Callable[[str], float]:
    """Argument type: a finite number within limits; `above` replaces `at_least` and is excluded."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        is_low = value < at_least if above is None else value <= above
        if not math.isfinite(value) or "_" in text or is_low or value > at_most:
            limits = f"of at least {at_least:g}" if above is None else f"above {above:g}"
            limits += "" if at_most == math.inf else f" and at most {at_most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def temperature(text: str) -> float:
    """Argument type: 0 for greedy decoding, or a sampling temperature from 0.01 to 100."""
    value = number(at_most=100)(text)
    if 0 < value < 0.01:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 (greedy) nor from 0.01 to 100")
    return value


def path(text: str) -> Path:
    """Argument type: a local path, as given, with `~` expanded; an empty one is refused."""
    try:
        absolute(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return Path(text).expanduser()


def path_or_url(text: str) -> str:
    """Argument type: an absolute local path, or a URL; an empty one is refused."""
    try:
        return absolute(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def add_logging_options(parser: argparse.ArgumentParser) -> None:
    """Add --quiet, --verbose, and --log-level."""
    group = parser.add_argument_group("logging")
    group.add_argument(
        "-q", "--quiet", action="store_true", help="print errors and the final result only"
    )
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also print startup messages of DeepSpeed and torch; as --log-level info",
    )
    group.add_argument(
        "--log-level",
        choices=_LOG_LEVELS,
        help="least severe message to print (default: warning)",
    )


def log_level(arguments: argparse.Namespace) -> int:
    """The level that the logging options choose; raises ConfigError if they contradict each other."""
    if arguments.quiet and arguments.verbose:
        raise ConfigError("--quiet and --verbose contradict each other; remove one of them")
    default = "error" if arguments.quiet else "info" if arguments.verbose else "warning"
    level = default if arguments.quiet else arguments.log_level or default
    return getattr(logging, level.upper())


def logging_arguments(arguments: argparse.Namespace) -> list[str]:
    """The logging options of a command line, to pass them on."""
    given = [f"--{name}" for name in ("quiet", "verbose") if getattr(arguments, name)]
    return given + (["--log-level", arguments.log_level] if arguments.log_level else [])


def configure_logging(
    arguments: argparse.Namespace, is_main: bool = True, log: Path | None = None
) -> None:
    """Apply the logging options.

    Other ranks than the main one print errors only, and log the rest to the file `log`.
    """
    logs.configure(log_level(arguments), is_main, log)


def version_text() -> str:
    """Return the output of `--version`."""
    return f"muomni {__version__}"
