"""`muomni completion SHELL`: a completion script, made by shtab from the parsers of all verbs."""

import argparse

from muomni.cli.main import VERBS, verb_module

SUMMARY = "Print a completion script; source it, or put it where the shell looks for completions."
EXAMPLES = (
    'eval "$(muomni completion bash)"',
    "muomni completion zsh > ~/.zfunc/_muomni",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    print(shtab.complete(complete_parser(), arguments.shell))


def complete_parser() -> argparse.ArgumentParser:
    """One parser with a subparser per verb."""
    parser = argparse.ArgumentParser(prog="muomni")
    verbs = parser.add_subparsers()
    for verb, summary in VERBS.items():
        module, subparser = verb_module(verb), verbs.add_parser(verb, help=summary)
        if hasattr(module, "add_options"):
            module.add_options(subparser)
    return parser
