"""The argument parser of all commands, with one-sentence errors, and common options.

Must not import torch, so that `--help` is fast.
"""

import argparse
import logging
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from muomni import __version__
from muomni.errors import ConfigError, did_you_mean

# Options of earlier versions, and their new names, for the error message.
RENAMED_OPTIONS = {
    "--licence": "--license",  # codespell:ignore licence
    "--normalise": "--normalize",  # codespell:ignore normalise
    "--side-by-side": "--parallel-stages",  # terms: allow
}
_LOG_LEVELS = ("debug", "info", "warning", "error")
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


def add_logging_options(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --log-level."""
    group = parser.add_argument_group("logging")
    group.add_argument(
        "--quiet", action="store_true", help="print errors and the final result only"
    )
    group.add_argument(
        "--log-level", choices=_LOG_LEVELS, default="warning", help="least severe message to print"
    )


def configure_logging(arguments: argparse.Namespace, is_main: bool = True) -> None:
    """Apply --quiet and --log-level; other ranks than the main one log errors only."""
    level = "error" if arguments.quiet else arguments.log_level
    logging.basicConfig(
        level=getattr(logging, level.upper()) if is_main else logging.ERROR, format="%(message)s"
    )


def version_text() -> str:
    """Return the output of `--version`."""
    return f"muomni {__version__}"
