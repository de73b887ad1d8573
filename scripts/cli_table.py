"""Write docs/cli.md, all commands and their options, from their parsers.

    python scripts/cli_table.py --write    # replace the text between the markers
    python scripts/cli_table.py --check    # exit with 1 if the page is out of date

Does not import torch.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.cli.main import build_parser
from muomni.cli.main import GROUPS, verb_module, verb_parser
from scripts.generated_page import GeneratedPage

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command by its name, `muomni data VERB` included, in the order of the help texts."""
    found: dict[str, argparse.ArgumentParser] = {}
    for verb in (verb for group in GROUPS.values() for verb in group):
        if verb == "data":
            subparsers = subparsers_of(build_parser("muomni data"))
            found |= {f"muomni data {name}": parser for name, parser in subparsers.items()}
        else:
            found[f"muomni {verb}"] = verb_parser(verb, verb_module(verb))
    return found


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subparsers of a parser by verb; empty if it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def render() -> str:
    """One section per command, as Markdown."""
    lines = []
    for name, parser in parsers().items():
        lines += ["", f"## {name}", "", *paragraphs(parser.description), "", *table(parser)]
    return "\n".join(lines[1:])


def paragraphs(text: str | None) -> list[str]:
    """The paragraphs of a description, one per line, with empty lines between them."""
    found = [" ".join(part.split()) for part in (text or "").split("\n\n")]
    return "\n\n".join(found).splitlines()


def table(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The arguments and options of a command; hidden ones and --help are omitted."""
    yield "| option | meaning |"
    yield "|---|---|"
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
                continue
            text = " ".join(formatter._expand_help(action).split())
            text += " (required)" if action.option_strings and action.required else ""
            cells = (cell.replace("|", "\\|") for cell in (f"`{invocation(action)}`", text))
            yield f"| {' | '.join(cells)} |"


def invocation(action: argparse.Action) -> str:
    """How an option is written, such as `--precision {auto,fp32}`, in all versions of Python alike."""
    if action.nargs == 0:
        value = ""
    elif action.metavar is not None:
        value = str(action.metavar)
    elif action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = action.dest.upper() if action.option_strings else action.dest
    if action.nargs == "+":
        value += " ..."
    elif action.nargs in ("*", "?"):
        value = f"[{value} ...]" if action.nargs == "*" else f"[{value}]"
    return f"{', '.join(action.option_strings)} {value}".strip()


GENERATED = GeneratedPage(PAGE, "cli", "scripts/cli_table.py", render)

if __name__ == "__main__":
    GENERATED.main(__doc__)
