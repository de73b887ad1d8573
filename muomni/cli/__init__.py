"""The command `muomni`: small tools around training, one verb each.

Importing this imports no torch; a verb imports what it needs when it runs.
"""

import argparse

from muomni.config.loading import preset_names
from muomni.errors import exit_on_error


def parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    flags = argparse.ArgumentParser(prog="muomni", description="Tools around training.")
    verbs = flags.add_subparsers(dest="verb", required=True, metavar="VERB")
    count = verbs.add_parser(
        "count",
        help="parameters and FLOPs of each stage's model",
        description="Print parameters and forward FLOPs of each stage's model, by formula. Training "
        "costs three times the forward pass.",
    )
    count.add_argument(
        "presets", nargs="*", metavar="PRESET",
        help=f"which presets; default: all ({', '.join(preset_names())})",
    )  # fmt: skip
    count.add_argument(
        "--vocab-size", type=int, default=2048, help="pieces of the tokenizer (default 2048)"
    )
    count.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; a user's mistake becomes one sentence and an exit code."""
    given = parser().parse_args(arguments)
    with exit_on_error("muomni"):
        from muomni.cli import count

        count.run(given.presets or preset_names(), given.vocab_size, as_json=given.json)
