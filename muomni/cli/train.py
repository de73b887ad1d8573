"""`muomni train`: train one stage on this machine, or run one rank of a job.

Without a launcher, it checks the config and starts the ranks with DeepSpeed's launcher. Under a launcher
(`deepspeed`, `torchrun`, `srun`) or with a single rank, it trains in this process, like launch/train.py.
"""

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muomni.command_line import CommandParser, configure_logging, integer, log_level
from muomni.config.arguments import EXAMPLES, add_train_options, resolve_train
from muomni.distributed.discovery import (
    Ranks,
    check_master_port,
    discover,
    export_environment,
    keep_first,
)
from muomni.distributed.launcher import start_rank
from muomni.errors import ConfigError, exit_on_error, exit_rank_on_error
from muomni.io.console import note_failures, protect_output
from muomni.io.live_line import LIVE_LINE
from muomni.io.logs import use_root_handlers
from muomni.observe.announce import BANNER_PRINTED, Startup, banner, outcome, row
from muomni.run_lock import held_by_this_process

if TYPE_CHECKING:
    from muomni.config.run import RunConfig
    from muomni.training.session import Request

SUMMARY = "Train one stage, or resume it."
SAMPLE_RUN = Path("runs/quickstart")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the training command and --ranks."""
    add_train_options(parser)
    parser.add_argument(
        "--ranks",
        type=integer(1, 2**20),
        metavar="N",
        help="processes to start (default: one per GPU; on a CPU 2, on one core 1)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check the config and start the ranks, or train in this process if it is a rank."""
    ranks = discover()
    if ranks.launcher == "alone" and not arguments.dry_run:
        from muomni.pipeline.local import (
            count_ranks,
            rank_environment,
            run_ranks,
            shareable_ranks,
            train_argv,
        )

        config = resolve_train(arguments)
        if arguments.count_ranks is None:
            announce(arguments, config)  # before counting GPUs, which imports torch
        num_ranks = arguments.ranks or shareable_ranks(config, count_ranks())
        if num_ranks > 1:
            if not arguments.quiet:
                print(row("start", f"{num_ranks} ranks, with DeepSpeed's launcher"), flush=True)
            command = train_argv(num_ranks, _without_ranks(sys.argv[2:]))
            raise SystemExit(run_ranks(command, rank_environment(num_ranks)))
    with exit_rank_on_error("muomni train", ranks.rank):
        run_rank(arguments, ranks)


def announce(arguments: argparse.Namespace, config: "RunConfig") -> None:
    """Print the banner unless --quiet is given, and let this process survive a closed standard output."""
    from muomni.run_folder import RunFolder

    protect_output(RunFolder(_run(arguments), config.stage).log)
    log_level(arguments)  # raises ConfigError
    if not arguments.quiet and BANNER_PRINTED not in os.environ:
        folder = _run(arguments) / config.stage
        print(banner(config.stage, arguments.preset, config.data.root, folder), flush=True)
    os.environ[BANNER_PRINTED] = "1"


def main_of_rank(argv: list[str] | None = None, prog: str = "train.py") -> None:
    """Train in this process; entry point of launch/train.py."""
    name = prog.removesuffix(".py")
    with exit_on_error(name):
        ranks = discover()
    # Every rank raises the same error; one message is enough.
    with exit_rank_on_error(name, ranks.rank):
        parser = CommandParser(prog, description=SUMMARY, examples=EXAMPLES)
        add_train_options(parser)
        run_rank(parser.parse_intermixed_args(argv), ranks)


def run_rank(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Train as one rank and print the result as the last line of standard output."""
    from muomni.run_folder import RunFolder

    # Resolve before importing torch, so that an unknown key is reported at once.
    config = resolve_train(arguments)
    if arguments.count_ranks is not None:
        print(min(arguments.count_ranks, config.batch.max_ranks or arguments.count_ranks))
        return
    start_rank(ranks, os.environ)
    if not arguments.dry_run:
        export_environment(ranks, os.environ)
        check_master_port(ranks, os.environ)
        if ranks.is_main:
            announce(arguments, config)
        else:
            protect_output(None)
            LIVE_LINE.is_shared = True
    log = (
        None if arguments.dry_run else RunFolder(_run(arguments), config.stage).rank_log(ranks.rank)
    )
    configure_logging(arguments, ranks.is_main, log)
    # Ranks read different samples, so each one reports its bad ones, whatever --log-level says.
    for reader in ("loading.loader", "loading.stream"):
        logging.getLogger(f"muomni.data.{reader}").setLevel(logging.WARNING)
    with Startup(ranks.is_main and not arguments.quiet and not arguments.dry_run) as startup:
        result = train(arguments, config, ranks, startup)
    if ranks.is_main:
        print(json.dumps(result), flush=True)


def train(
    arguments: argparse.Namespace,
    config: "RunConfig",
    ranks: Ranks,
    startup: Startup | None = None,
) -> dict[str, Any]:
    """Check, start the process group, and train; returns the result."""
    startup = startup or Startup()
    startup.begin("import")
    is_planned = arguments.gpus is not None
    if not arguments.dry_run and (is_planned or arguments.gpu_gib is not None):
        raise ConfigError("--gpus and --gpu-gib plan a run; add --dry-run, or remove them")
    if is_planned:
        ranks = replace(ranks, world_size=arguments.gpus)
    request = build_request(arguments, config, startup)
    from muomni.training import session as sessions

    if not ranks.is_main:
        use_root_handlers("DeepSpeed")
    startup.begin("data")
    session = sessions.prepare(request, ranks)
    num_usable = session.feed.max_ranks
    if num_usable < ranks.world_size and ranks.launcher != "srun":
        if ranks.is_main:
            print(_explain_surplus(config, num_usable, ranks.world_size), flush=True)
        if ranks.rank >= num_usable:
            raise SystemExit(0)
        environ = dict(os.environ) if arguments.dry_run else os.environ
        ranks = keep_first(ranks, num_usable, environ)
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

        # Every rank predicts for rank 0, so that all come to the same result.
        first = session if ranks.is_main else sessions.prepare(request, replace(ranks, rank=0))
        startup.begin("memory check")
        device = dry_run.find_device(first)
        dry_run.check_memory(first, dry_run.preview(first, device), device)
    from muomni.inference.samples import record_samples, sample_at_validations
    from muomni.run_folder import RunFolder
    from muomni.training.engine.process_group import process_group

    with ExitStack() as stack:
        folder = RunFolder(request.run, config.stage)
        if ranks.is_main:
            folder.create()
            note_failures()
            stack.enter_context(held_by_this_process(folder.root))
        startup.begin("process group")
        with process_group(session.device, config.training.collective_timeout_s):
            loop = sessions.open_loop(session)
            sample_at_validations(loop)
            with _frozen_garbage():
                result = loop.run()
        if ranks.is_main and session.val is not None:
            record_samples(session.stage, session.val, folder, loop.recorders, loop.run_info())
    if ranks.is_main and not arguments.quiet:
        best = loop.state.best
        named = None if best is None else (f"val/{session.stage.best_metric}", best)
        print(
            outcome(config.stage, named, result["export"], startup.age_s, request.run), flush=True
        )
    return result


def _explain_surplus(config: "RunConfig", num_usable: int, num_ranks: int) -> str:
    return (
        f"{config.stage} trains on {num_usable} of {num_ranks} ranks: a global batch "
        f"({config.batch.describe()}) has no work for more; raise batch.{config.batch.global_key} to use all"
    )


def build_request(
    arguments: argparse.Namespace, config: "RunConfig", startup: Startup
) -> "Request":
    """Build the request of a command line; raises ConfigError."""
    from muomni.distributed.deepspeed_import import import_deepspeed

    import_deepspeed()
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.session import Request

    return Request(
        config,
        _run(arguments),
        arguments.upstream or arguments.run or SAMPLE_RUN,
        read_engine_json(arguments.deepspeed_config),
        arguments.resume,
        arguments.allow_mix_change,
        is_for_other_gpus=arguments.gpus is not None or arguments.gpu_gib is not None,
        quiet=arguments.quiet,
        startup=startup,
    )


def _run(arguments: argparse.Namespace) -> Path:
    return arguments.run or Path("runs/default")


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Exclude the about one million existing objects from garbage collection.

    Otherwise Python scans them about every hundred steps, which stalls all ranks for a third of a second.
    """
    gc.collect()
    gc.freeze()
    yield


def _without_ranks(argv: list[str]) -> list[str]:
    """Remove --ranks, which the ranks themselves do not accept."""
    kept, skip = [], False
    for argument in argv:
        if skip or argument.startswith("--ranks="):
            skip = False
        elif argument == "--ranks":
            skip = True
        else:
            kept.append(argument)
    return kept
