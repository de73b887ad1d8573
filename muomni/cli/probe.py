"""`muomni probe`: the largest micro-batch that fits this device, as a config file."""

import argparse
import json
import os
import tempfile
from pathlib import Path

from muomni.command_line import configure_logging, number, path
from muomni.config.arguments import add_run_options, resolve_train
from muomni.errors import ConfigError

SUMMARY = """\
Find the largest micro-batch of a stage that trains on this device, and write it to a config file.

Each size runs a real step on one rank, on the longest samples. More ranks shard the optimizer state (ZeRO), so
they need less memory. The result changes speed and memory, not what a run learns."""
EXAMPLES = (
    "muomni probe --stage thinker --preset base --data DIR --out micro.yaml",
    "muomni train --stage thinker --preset base --data DIR --config micro.yaml",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run, the memory limit, and the output file."""
    add_run_options(parser)
    group = parser.add_argument_group("memory and output")
    group.add_argument(
        "--memory-gib", type=number(at_most=1e6, above=0), metavar="GIB",
        help="memory to use (default: 0.92 of the GPU; required on a CPU)",
    )  # fmt: skip
    group.add_argument(
        "--out", type=path, metavar="FILE", help="YAML file for --config (default: print only)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Probe, print the trials, and write the config file; raises MuomniError."""
    configure_logging(arguments)
    config = resolve_train(arguments)
    from muomni.cli.train import SAMPLE_RUN
    from muomni.distributed.deepspeed_import import import_deepspeed
    from muomni.distributed.discovery import Ranks, export_environment
    from muomni.distributed.launcher import start_rank

    start_rank(Ranks(), os.environ)  # with the allocator of a run
    import_deepspeed()
    import torch

    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.engine.process_group import process_group
    from muomni.training.planning.probe import probe
    from muomni.training.session import Request, prepare

    with tempfile.TemporaryDirectory() as folder:
        upstream = arguments.upstream or arguments.run or SAMPLE_RUN
        engine_json = read_engine_json(arguments.deepspeed_config)
        request = Request(config, Path(folder), upstream, engine_json, "never", quiet=True)
        session = prepare(request, Ranks())
        max_gib = arguments.memory_gib
        if max_gib is None:
            if session.device.type != "cuda":
                raise ConfigError("a CPU has no memory limit of its own; give --memory-gib")
            max_gib = 0.92 * torch.cuda.get_device_properties(session.device).total_memory / 2**30
        export_environment(Ranks(), os.environ)
        with process_group(session.device):
            found = probe(session, int(max_gib * 2**30))
    for trial in found.trials:
        peak = "out of memory" if trial.peak is None else f"{trial.peak / 2**30:.3f} GiB"
        print(f"{config.stage} {trial.size} x {trial.length}: {peak}")
    if arguments.out is not None:
        _write(arguments.out, found.key, found.value)
    print(json.dumps({"stage": config.stage, f"batch.{found.key}": found.value}))


def _write(path: Path, key: str, value: int) -> None:
    """Set the key in a config file, which may have other settings."""
    import yaml

    from muomni.config.loading import merge, read_yaml
    from muomni.io.atomic_write import open_atomic

    content = merge(read_yaml(path) if path.exists() else {}, {"batch": {key: value}})
    with open_atomic(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())
