"""docs/cli.md is current, and its tables describe arguments as a user writes them."""

from muomni.cli.main import VERBS
from muomni.command_line import CommandParser
from scripts.cli_table import GENERATED, invocation, parsers, table


def test_page_is_current() -> None:
    page = GENERATED.path.read_text(encoding="utf-8")
    assert GENERATED.updated(page) == page, "run: python scripts/cli_table.py --write"


def test_every_verb_has_a_section() -> None:
    names = {name.split()[1] for name in parsers()}
    assert names == set(VERBS)


def test_table() -> None:
    parser = CommandParser("x", description="")
    parser.add_argument("run", help="folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kind", choices=("a", "b"), default="a", help="one | other")
    parser.add_argument("--files", nargs="+", required=True, help="files")
    actions = parser._actions[1:]
    assert [invocation(action) for action in actions] == [
        "run", "[key=value ...]", "--kind {a,b}", "--files FILES ...",
    ]  # fmt: skip
    assert list(table(parser))[-2:] == [
        "| `--kind {a,b}` | one \\| other (default: a) |",
        "| `--files FILES ...` | files (required) |",
    ]
