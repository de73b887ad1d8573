"""Train one stage: `deepspeed launch/train.py --stage sft`.

Works the same under deepspeed, torchrun, srun and plain python, on CPUs and GPUs. The last line of
standard output is one JSON object with the result.
"""

import argparse
import gc
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.config.loading import CONFIG_ROOT, merge, parse_override, preset_names, resolve
from muomni.config.run import STAGE_NAMES, RunConfig
from muomni.distributed.deepspeed_import import import_deepspeed
from muomni.distributed.discovery import Ranks, discover, export_environment
from muomni.errors import ConfigError, exit_on_error

SAMPLE_RUN = Path("runs/quickstart")


def parser() -> argparse.ArgumentParser:
    """The command line (docs/configuration.md lists the keys for key=value)."""
    flags = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--stage", required=True, help=f"one of {', '.join(STAGE_NAMES)}")
    flags.add_argument(
        "--preset", default="nano", help=f"sizes: {', '.join(preset_names())} (nano)"
    )
    flags.add_argument("--config", type=Path, help="YAML file laid over the stage's recipe")
    flags.add_argument(
        "--data", help="a dataset or a folder of datasets, a path or a URL (data/sample)"
    )
    flags.add_argument("--run", type=Path, help="run folder (runs/default)")
    flags.add_argument(
        "--upstream", type=Path,
        help=f"run folder whose exports this stage loads (--run; without --run: {SAMPLE_RUN})",
    )  # fmt: skip
    flags.add_argument(
        "--deepspeed_config", type=Path, default=CONFIG_ROOT / "deepspeed" / "zero1.json",
        help="engine JSON, see configs/deepspeed (zero1.json)",
    )  # fmt: skip
    flags.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"))
    flags.add_argument("--max-steps", type=int, help="optimizer steps of the whole run")
    flags.add_argument(
        "--resume", default="auto", help="auto, never, or a checkpoint folder (auto)"
    )
    flags.add_argument(
        "--dry-run", action="store_true", help="check everything, print it, do not train"
    )
    flags.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --dry-run: plan for N GPUs, which need not be here",
    )
    flags.add_argument(
        "--gpu-gib", type=float, metavar="GIB", help="with --dry-run: memory of each GPU"
    )
    flags.add_argument(
        "--check-memory",
        action="store_true",
        help="do not start when the predicted memory of a rank is more than it has",
    )
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=3e-4")
    return flags


def resolve_config(arguments: argparse.Namespace) -> RunConfig:
    """The run config that files, flags and overrides give; raises ConfigError."""
    overrides: dict[str, Any] = {}
    for text in arguments.overrides:
        overrides = merge(overrides, parse_override(text))
    if arguments.data:
        overrides = merge(overrides, {"data": {"root": arguments.data}})
    if arguments.precision:
        overrides = merge(overrides, {"precision": arguments.precision})
    if arguments.max_steps is not None:
        length = {"max_steps": arguments.max_steps, "max_epochs": None}
        overrides = merge(overrides, {"training": length})
    return resolve(arguments.stage, arguments.preset, arguments.config, overrides)


def build_request(arguments: argparse.Namespace) -> Any:
    """All that the command line asks for; raises ConfigError."""
    import_deepspeed()
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.session import Request

    run = arguments.run or Path("runs/default")
    upstream = arguments.upstream or arguments.run or SAMPLE_RUN
    engine_json = read_engine_json(arguments.deepspeed_config)
    is_for_other_gpus = arguments.gpus is not None or arguments.gpu_gib is not None
    return Request(
        resolve_config(arguments), run, upstream, engine_json, arguments.resume, is_for_other_gpus
    )


def main() -> None:
    arguments = parser().parse_intermixed_args()
    ranks = discover()
    # Every rank finds the same mistake; one sentence is enough.
    with exit_on_error("train", is_main=ranks.is_main):
        logging.basicConfig(
            level=logging.WARNING if ranks.is_main else logging.ERROR, format="%(message)s"
        )
        # Each rank reads samples of its own, so each tells of the bad ones.
        for reader in ("loading.loader", "loading.stream"):
            logging.getLogger(f"muomni.data.{reader}").setLevel(logging.WARNING)
        result = train(arguments, ranks)
        if ranks.is_main:
            print(json.dumps(result), flush=True)


def train(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Check, start the process group, train; returns the result."""
    is_planned = arguments.gpus is not None
    if not arguments.dry_run and (is_planned or arguments.gpu_gib is not None):
        raise ConfigError("--gpus and --gpu-gib plan a run; give --dry-run, too, or leave them out")
    if arguments.gpu_gib is not None and arguments.gpu_gib <= 0:
        raise ConfigError(f"--gpu-gib is {arguments.gpu_gib:g}; give the memory of a GPU in GiB")
    if is_planned:
        if arguments.gpus < 1:
            raise ConfigError(f"--gpus is {arguments.gpus}; give the number of GPUs to plan for")
        ranks = replace(ranks, world_size=arguments.gpus)
    request = build_request(arguments)
    from muomni.training import session as sessions

    session = sessions.prepare(request, ranks)
    if arguments.dry_run:
        from muomni.training.planning import dry_run

        device = dry_run.find_device(session, is_planned, arguments.gpu_gib)
        seen = dry_run.preview(session, device)
        metrics = dry_run.describe(session, device, seen)
        if arguments.check_memory:
            dry_run.check_memory(session, seen, device)
        return metrics
    finished = sessions.finished_result(session)
    if finished is not None:
        return finished
    if arguments.check_memory:
        from muomni.training.planning import dry_run

        # What the first rank has to compute: all ranks must come to the same end.
        first = session if ranks.is_main else sessions.prepare(request, replace(ranks, rank=0))
        device = dry_run.find_device(first)
        dry_run.check_memory(first, dry_run.preview(first, device), device)
    from muomni.training.engine.process_group import process_group

    export_environment(ranks, os.environ)
    with process_group(session.device):
        loop = sessions.open_loop(session)
        # All that exists now stays until the end: about a million objects. Without this Python looks at
        # all of them again every hundred steps or so, for a third of a second, in which other ranks wait.
        gc.collect()
        gc.freeze()
        result = loop.run()
    if ranks.is_main and session.val is not None:
        from muomni.inference.samples import record_samples

        folder, info = loop.parts.folder, loop.run_info()
        record_samples(session.stage, session.val, folder, loop.recorders, info)
    return result


if __name__ == "__main__":
    main()
