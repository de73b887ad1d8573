"""The argument parser of all commands, with one-sentence errors, and common options.

Must not import torch, so that `--help` is fast.
"""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from muomni import __version__
from muomni.errors import ConfigError, did_you_mean

_LOG_LEVELS = ("debug", "info", "warning", "error")


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises ConfigError and suggests similar options.

    `examples` end the help text; `renamed` maps options of earlier versions to their new names.
    """

    def __init__(
        self,
        prog: str,
        description: str | None,
        examples: Sequence[str] = (),
        renamed: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        lines = ["examples:", *(f"  {example}" for example in examples)]
        super().__init__(
            prog=prog,
            description=description,
            epilog="\n".join(lines) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.renamed = dict(renamed or {})

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and exiting."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is None:
            raise ConfigError(f"{message}; see {self.prog} --help")
        option = unknown[1].partition("=")[0]
        if option in self.renamed:
            raise ConfigError(f"option {option} was renamed to {self.renamed[option]}")
        known = [text for action in self._actions for text in action.option_strings]
        what = "unknown option" if option.startswith("-") else "unexpected argument"
        raise ConfigError(f"{what} {option}{did_you_mean(option, known)}; see {self.prog} --help")


def add_logging_options(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --log-level."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--quiet", action="store_true", help="print warnings, errors, and the final result only"
    )
    group.add_argument(
        "--log-level",
        choices=_LOG_LEVELS,
        default="warning",
        help="least severe log message to print (default: warning)",
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
