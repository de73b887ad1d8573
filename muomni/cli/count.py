"""`muomni count`: parameters and FLOPs of every stage at the sizes of a preset."""

import argparse
import json
from dataclasses import asdict

from muomni.command_line import integer
from muomni.config.names import preset_names

SUMMARY = """\
Print parameters and forward FLOPs of every stage's model, by formula. Training costs three times the
forward pass."""
EXAMPLES = ("muomni count nano tiny", "muomni count small --vocab-size 32000 --json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add presets, vocabulary, and output format."""
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET",
        help=f"any of {', '.join(preset_names())} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=integer(1, 2**24), default=2048, metavar="N",
        help="tokens (default: 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the tables of some presets; raises ConfigError for an unknown one."""
    from muomni.training.planning.model_counts import count_preset, table

    presets = arguments.presets or preset_names()
    vocab_size = arguments.vocab_size
    rows = {preset: count_preset(preset, vocab_size) for preset in presets}
    if arguments.json:
        content = {preset: [asdict(row) for row in counted] for preset, counted in rows.items()}
        print(json.dumps(content))
        return
    print("\n\n".join(table(preset, vocab_size, counted) for preset, counted in rows.items()))
