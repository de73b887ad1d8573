"""`muomni pipeline`: train all stages of a run, each on the exports of its upstream stages."""

import argparse
import json
import time
from dataclasses import asdict

from muomni.command_line import (
    CommandParser,
    add_logging_options,
    configure_logging,
    integer,
    path,
    path_or_url,
)
from muomni.config.names import preset_names, recipe_names
from muomni.errors import ConfigError, exit_on_error
from muomni.io.console import protect_output
from muomni.observe.announce import banner, next_steps

SUMMARY = """\
Train all stages in dependency order.

Finished stages are skipped, interrupted ones resume, and those whose upstream stage was retrained start over.
The first failure stops the rest. Arguments after "--" go to the training command of every stage;
STAGE.key=value goes to one stage. The last line of standard output is one JSON object."""
EXAMPLES = (
    "muomni pipeline --preset nano --data data/sample --run runs/first",
    "muomni pipeline --preset small --data DIR --run DIR --slurm --sbatch '--partition=gpu --gpus-per-node=8'",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options before "--"."""
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--preset", default="nano", help=f"model sizes: {', '.join(preset_names())} (default: nano)"
    )
    what.add_argument(
        "--stages",
        metavar="A,B",
        help=f"train only some of {', '.join(recipe_names())} (default: all)",
    )
    where = parser.add_argument_group("input and output")
    where.add_argument(
        "--data",
        type=path_or_url,
        default="data/sample",
        help="folder of datasets (default: data/sample)",
    )
    where.add_argument("--run", type=path, required=True, help="run folder of all stages")
    where.add_argument(
        "--experiment", metavar="NAME", help="MLflow experiment (default: name of the run folder)"
    )
    how = parser.add_argument_group("execution")
    how.add_argument(
        "--ranks", type=integer(1, 2**20), metavar="N",
        help="processes per stage (default: one per GPU; on a CPU 2, on one core 1)",
    )  # fmt: skip
    how.add_argument(
        "--parallel-stages", type=integer(1, 2**20), default=1, metavar="N",
        help="train up to N independent stages at a time, each on 1/N of the ranks (default: 1)",
    )  # fmt: skip
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the commands, but run nothing",
    )
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--slurm", action="store_true", help="submit one job per stage")
    slurm.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="sbatch options of all training jobs"
    )
    for stage in recipe_names():
        slurm.add_argument(
            f"--sbatch-{stage}", default="", metavar="OPTIONS", help=argparse.SUPPRESS
        )
    slurm.add_argument(
        "--shards", action="append", default=[], metavar="ARGUMENTS",
        help="shard a corpus first, with these arguments of muomni data; repeatable",
    )  # fmt: skip
    slurm.add_argument(
        "--vocab-size",
        type=integer(1, 2**24),
        metavar="N",
        help="then train a tokenizer of this size on all datasets",
    )
    slurm.add_argument(
        "--array", default="0-3", metavar="TASKS",
        help="tasks of each sharding array, such as 0-15%%8 (default: 0-3)",
    )  # fmt: skip
    slurm.add_argument(
        "--sbatch-shards", default="", metavar="OPTIONS", help="sbatch options of sharding jobs"
    )
    slurm.add_argument("--no-evaluate", action="store_true", help="submit no evaluation jobs")
    add_logging_options(parser)


def main(argv: list[str], prog: str = "muomni pipeline") -> None:
    """Parse the options before "--" and run; the rest goes to the training commands."""
    argv = _with_joined_values(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    with exit_on_error(prog.removesuffix(".py")):
        parser = CommandParser(prog, description=SUMMARY, examples=EXAMPLES)
        add_options(parser)
        run(parser.parse_args(argv[:end]), argv[end + 1 :])


def _with_joined_values(argv: list[str]) -> list[str]:
    """Join `--sbatch VALUE` to `--sbatch=VALUE`, since argparse parses `--nodes=4` as an option."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].startswith(("--sbatch", "--shards")) and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def run(arguments: argparse.Namespace, extra: list[str]) -> None:
    """Check all stages, then train or submit them."""
    from muomni.pipeline.runner import Pipeline, results_table

    configure_logging(arguments)
    stages = chosen_stages(arguments.stages)
    if arguments.experiment is not None:
        extra = [*extra, "--experiment", arguments.experiment]
    pipeline = Pipeline(arguments, extra)
    # Check all configs first, so that an error in a late stage shows up at once.
    configs = pipeline.configs(stages)
    if arguments.slurm:
        from muomni.pipeline.slurm import submit

        submit(arguments, stages, extra)
        return
    if not arguments.dry_run:
        protect_output(arguments.run / "pipeline.log")
        if not arguments.quiet:
            what = stages[0] if len(stages) == 1 else f"{len(stages)} stages"
            print(
                banner(what, arguments.preset, arguments.data, arguments.run),
                flush=True,
            )
    pipeline.check(configs)
    if arguments.dry_run:
        pipeline.describe(configs)
        return
    start = time.monotonic()
    results = pipeline.run(configs)
    if not arguments.quiet:
        print(
            "\n" + results_table(results), next_steps(arguments.run, stages), sep="\n", flush=True
        )
    content = {
        "run": str(arguments.run),
        "duration_s": round(time.monotonic() - start, 1),
        "stages": {stage: asdict(result) for stage, result in results.items()},
    }
    print(json.dumps(content), flush=True)


def chosen_stages(text: str | None) -> list[str]:
    """Return the stages to run in dependency order; raises ConfigError."""
    from muomni.config.registry import STAGES, stage_spec

    if text is None:
        return list(STAGES)
    names = {stage_spec(name.strip()).name for name in text.split(",")}
    if not names:
        raise ConfigError("--stages names no stage")
    return [stage for stage in STAGES if stage in names]
