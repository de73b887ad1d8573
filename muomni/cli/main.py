"""`muomni VERB ...`: import the verb's module and run it.

A verb's module has `add_options(parser)`, `run(arguments) -> None`, and the constants `SUMMARY` and
`EXAMPLES`. None imports torch at the top, so `--help` is fast.
"""

import sys
from importlib import import_module
from types import ModuleType

from muomni.command_line import CommandParser, version_text
from muomni.errors import ConfigError, did_you_mean, exit_on_error

# Verbs by group, in the order of the help text.
GROUPS: dict[str, dict[str, str]] = {
    "train": {
        "data": "prepare corpora: shard, verify, inspect (also: python -m data_prep)",
        "train": "train one stage",
        "pipeline": "train all stages in order, here or on Slurm",
    },
    "results": {
        "evaluate": "held-out metrics of a stage and trivial baselines",
        "summary": "table of all evaluations of a run",
        "compare": "table and curves of several runs",
        "sync-mlflow": "send to MLflow what it lacks of a run",
        "generate": "answer a question of text, images, and audio",
    },
    "checkpoints and exports": {
        "ckpt": "list the checkpoints of a run",
        "convert": "convert an export to a published format",
    },
    "planning": {
        "count": "parameters and FLOPs of every stage",
        "probe": "find the largest micro-batch that fits the device",
        "doctor": "check machine, data, and config",
        "completion": "print a completion script for bash, zsh, or tcsh",
    },
}
VERBS = {verb: summary for group in GROUPS.values() for verb, summary in group.items()}


def help_text() -> str:
    """Return the text of `muomni --help`."""
    lines = ["usage: muomni VERB [options]", ""]
    for group, verbs in GROUPS.items():
        lines += [f"{group}:", *(f"  {verb:<12}{summary}" for verb, summary in verbs.items()), ""]
    lines += [
        "muomni VERB --help shows the options of a verb.",
        "",
        "examples:",
        "  muomni pipeline --preset nano --data data/sample --run runs/first",
        "  muomni count nano tiny",
    ]
    return "\n".join(lines)


def verb_module(verb: str) -> ModuleType:
    """Import the module of a verb; raises ConfigError for an unknown verb."""
    if verb not in VERBS:
        raise ConfigError(
            f"unknown verb '{verb}'{did_you_mean(verb, tuple(VERBS))}; verbs: {', '.join(VERBS)}"
        )
    return import_module(f"muomni.cli.{verb.replace('-', '_')}")


def verb_parser(verb: str, module: ModuleType, prog: str | None = None) -> CommandParser:
    """Build the parser of a verb."""
    name = prog or f"muomni {verb}"
    parser = CommandParser(name, description=module.SUMMARY, examples=module.EXAMPLES)
    module.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one verb; user errors are printed as one sentence and set the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(version_text())
        return
    verb, rest = arguments[0], arguments[1:]
    with exit_on_error("muomni"):
        module = verb_module(verb)
    run_verb(verb, module, rest)


def run_verb(verb: str, module: ModuleType, argv: list[str], prog: str | None = None) -> None:
    """Parse the options of a verb and run it; `prog` is the program name of a script in launch/."""
    if hasattr(module, "main"):  # parses its own options
        module.main(argv)
        return
    with exit_on_error(prog or f"muomni {verb}"):
        module.run(verb_parser(verb, module, prog).parse_intermixed_args(argv))
