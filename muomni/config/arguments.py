"""Options of the training command, and the run config that they resolve to."""

import argparse
from typing import TYPE_CHECKING, Any

from muomni.command_line import (
    CommandParser,
    add_logging_options,
    integer,
    number,
    path,
    path_or_url,
)
from muomni.config.names import ENGINES, preset_names, recipe_names

if TYPE_CHECKING:  # --help must not import pydantic
    from muomni.config.run import RunConfig

DEFAULT_ENGINE = ENGINES / "zero1.json"
EXAMPLES = (
    "muomni train --stage thinker --preset nano --data data/sample --run runs/first",
    "muomni train --stage sft --preset small --data DIR --run DIR --precision bf16 optim.lr=3e-4",
)


def add_run_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that define a run; returns the group of input and output.

    docs/config_keys.md lists the keys for key=value.
    """
    what = parser.add_argument_group("what to train")
    what.add_argument("--stage", required=True, help=f"one of {', '.join(recipe_names())}")
    what.add_argument(
        "--preset",
        help=f"model sizes: {', '.join(preset_names())} (default: that of --config, or nano)",
    )
    what.add_argument(
        "--config",
        type=path,
        help="YAML file whose keys override the recipe, or the config.yaml of a run",
    )
    what.add_argument("--max-steps", type=integer(1), help="optimizer steps of the complete run")
    what.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=3e-4")
    where = parser.add_argument_group("input and output")
    where.add_argument(
        "--data",
        type=path_or_url,
        help="a dataset or folder of datasets, path or URL (default: data/sample)",
    )
    where.add_argument("--run", type=path, help="run folder (default: runs/default)")
    where.add_argument(
        "--upstream",
        type=path,
        help="run folder with the exports that this stage loads (default: --run, or runs/quickstart)",
    )
    where.add_argument(
        "--experiment", metavar="NAME", help="MLflow experiment (default: name of the run folder)"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=path,
        default=DEFAULT_ENGINE,
        help="DeepSpeed JSON, see configs/deepspeed (default: zero1.json)",
    )
    engine.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="auto: bf16 or fp16 on GPUs, fp32 on CPUs (default: the recipe's, auto)",
    )
    add_logging_options(parser)
    return where


def _resume(text: str) -> str:
    return text if text in ("auto", "never") else str(path(text))


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `muomni train`."""
    where = add_run_options(parser)
    where.add_argument(
        "--resume",
        type=_resume,
        default="auto",
        help="auto, never, or a checkpoint folder (default: auto)",
    )
    where.add_argument(
        "--allow-mix-change",
        action="store_true",
        help="resume with another data.mix, which applies to later steps",
    )
    plan = parser.add_argument_group("checks before a run")
    plan.add_argument(
        "--dry-run", action="store_true", help="check and print everything, train nothing"
    )
    plan.add_argument(
        "--gpus", type=integer(1, 2**20), metavar="N",
        help="with --dry-run: plan for N GPUs, here or elsewhere",
    )  # fmt: skip
    plan.add_argument(
        "--gpu-gib", type=number(at_most=1e6, above=0), metavar="GIB",
        help="with --dry-run: memory of each GPU",
    )  # fmt: skip
    plan.add_argument(
        "--check-memory",
        action="store_true",
        help="reject a run whose predicted memory per rank exceeds the available memory",
    )
    parser.add_argument("--local_rank", type=integer(-1), help=argparse.SUPPRESS)
    # For slurm/train.sbatch: print how many of N ranks a global batch keeps busy, and exit.
    parser.add_argument("--count-ranks", type=integer(1), metavar="N", help=argparse.SUPPRESS)


def parse_train(
    arguments: list[str] | None = None, prog: str = "muomni train"
) -> argparse.Namespace:
    """Parse the options of a training command; raises ConfigError."""
    parser = CommandParser(prog, description="Train one stage, or resume it.", examples=EXAMPLES)
    add_train_options(parser)
    return parser.parse_intermixed_args(arguments)


def resolve_train(arguments: argparse.Namespace) -> "RunConfig":
    """Resolve recipe, preset, file, options, and overrides to a run config; raises ConfigError."""
    from muomni.config.loading import merge, parse_override, resolve
    from muomni.config.registry import stage_spec

    config = stage_spec(arguments.stage).config
    overrides: dict[str, Any] = {}
    for text in arguments.overrides:
        overrides = merge(overrides, parse_override(text, config))
    if arguments.data is not None:
        overrides = merge(overrides, {"data": {"root": arguments.data}})
    if arguments.experiment is not None:
        overrides = merge(overrides, {"training": {"experiment": arguments.experiment}})
    if arguments.precision:
        overrides = merge(overrides, {"precision": arguments.precision})
    if arguments.max_steps is not None:
        length = {"max_steps": arguments.max_steps, "max_epochs": None}
        overrides = merge(overrides, {"training": length})
    return resolve(arguments.stage, arguments.preset, arguments.config, overrides)


def arguments_for(stage: str, extra: list[str]) -> list[str]:
    """Select the pipeline arguments for one stage; STAGE.key=value goes to that stage only.

    The values of options, such as a file `sft.yaml`, go to every stage.
    """
    from muomni.config.registry import STAGES

    parser = CommandParser("train")
    add_train_options(parser)
    chosen, is_value = [], False
    for argument in extra:
        prefix, dot, rest = argument.partition(".")
        if is_value or not dot or prefix not in STAGES or "=" not in rest:
            chosen.append(argument)
        elif prefix == stage:
            chosen.append(rest)
        is_value = not is_value and parser.takes_value(argument)
    return chosen
