"""`muomni chat`: a conversation in the terminal with the export of stage sft."""

import argparse
import sys
from typing import NoReturn

from muomni.cli.generate import add_chat_options, chat_options
from muomni.errors import ConfigError, MachineError

SUMMARY = """\
Talk to a trained model in the terminal.

Lines are questions; /image and /audio attach files, /speak speaks the answer, and /help lists all commands.
Lines can also be piped in; then the exit code is 1 if one of them failed."""
EXAMPLES = (
    "muomni chat --run runs/first",
    "printf '/image cat.png\\nWhat is this?\\n' | muomni chat --run runs/first",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the run, the limits of answers, and sampling."""
    add_chat_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Converse until /quit or the end of input; raises MuomniError."""
    if sys.stdin is None or sys.stdout is None:
        closed = "input" if sys.stdin is None else "output"
        raise ConfigError(
            f"standard {closed} is closed; start muomni chat in a terminal, or with pipes"
        )
    from muomni.io.console import SteadyStream

    sys.stdout = SteadyStream(sys.stdout, _end)  # pyright: ignore[reportAttributeAccessIssue]
    if sys.stdout.isatty():
        print(f"loading {arguments.run} ...", flush=True)
    from muomni.chat.session import ChatSession
    from muomni.chat.terminal import Terminal
    from muomni.inference.load import open_assistant

    assistant = open_assistant(arguments.run, not arguments.no_tf32)
    terminal = Terminal(ChatSession(assistant, chat_options(arguments)))
    if terminal.run() and not terminal.is_interactive:
        raise SystemExit(1)


def _end(error: OSError) -> NoReturn:
    """End the conversation when nobody reads it any longer."""
    print(
        f"muomni chat: cannot write to standard output ({error.strerror}); the conversation ends",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(MachineError.exit_code) from None
