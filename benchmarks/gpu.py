"""Settings of the stage thinker that only a GPU can choose between: speed, MFU, and memory of each.

    make bench-gpu
    python benchmarks/gpu.py --preset small --data data/sample --only compiled

Each case trains in processes of its own, one per GPU, through the real session, engine, and loop: some steps to
warm up (which include compilation), then timed ones. `mfu` is that of training logs (docs/performance.md),
`peak_gib` is `torch.cuda.max_memory_allocated` of the timed steps, and `predicted_gib` is the dry run's
prediction for them. Runs on CPUs, too, to test the script; then there is no MFU and no peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from muomni.config.loading import merge, parse_override, resolve
from muomni.config.names import ENGINES
from muomni.distributed.discovery import discover, export_environment, free_port
from muomni.errors import exit_on_error
from muomni.io.table import format_table

GIB = 2**30
COLUMNS = ("tokens_per_s", "step_ms", "mfu", "peak_gib", "predicted_gib")


@dataclass(frozen=True, slots=True)
class Case:
    """Settings of one run: config overrides, and additions to the DeepSpeed JSON of the ZeRO stage."""

    name: str
    zero: int = 1
    overrides: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)


MASK, VARLEN = "training.attention=mask", "training.attention=varlen"
EAGER, COMPILED = "training.compile=false", "training.compile=true"
CASES = (
    Case("mask, eager", overrides=(MASK, EAGER)),
    Case("varlen, eager", overrides=(VARLEN, EAGER)),
    Case("mask, compiled", overrides=(MASK, COMPILED)),
    *(Case(f"ZeRO {n}, compiled", n, (VARLEN, COMPILED)) for n in range(4)),
    Case(
        "ZeRO 1, sums in bf16", 1, (VARLEN, COMPILED), {"data_types": {"grad_accum_dtype": "bf16"}}
    ),
    Case(
        "ZeRO 2, no overlap", 2, (VARLEN, COMPILED),
        {"zero_optimization": {"overlap_comm": False}},
    ),
    Case("recomputed", overrides=(VARLEN, COMPILED, "training.activation_checkpointing=full")),
)  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="small")
    flags.add_argument("--precision", default="bf16")
    flags.add_argument("--ranks", type=int, default=1, help="GPUs to use")
    flags.add_argument("--warm-up", type=int, default=5, help="steps before the timed ones")
    flags.add_argument("--steps", type=int, default=20, help="timed steps")
    flags.add_argument("--only", default="", help="only cases whose name contains this text")
    flags.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all cases")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--case", help=argparse.SUPPRESS)
    arguments = flags.parse_intermixed_args()
    with exit_on_error("gpu"):
        if arguments.case:
            measure(Case(**json.loads(arguments.case)), arguments)
            return
        rows = [row(case, arguments) for case in CASES if arguments.only in case.name]
    print(format_table(["case", *COLUMNS], [[r["name"], *map(_cell(r), COLUMNS)] for r in rows]))
    if arguments.json:
        settings = {
            name: vars(arguments)[name] for name in ("preset", "precision", "ranks", "steps")
        }
        settings["overrides"] = arguments.overrides
        content = {"settings": settings, "cases": rows, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cell(row: dict[str, Any]) -> Any:
    return lambda name: "-" if row.get(name) is None else f"{row[name]:,.4g}"


def row(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case in processes of its own; a failure, such as too little memory, is part of the result."""
    command = [
        sys.executable, __file__, *arguments.overrides, "--case", json.dumps(asdict(case)),
        "--data", arguments.data, "--preset", arguments.preset, "--precision", arguments.precision,
        "--warm-up", str(arguments.warm_up), "--steps", str(arguments.steps),
    ]  # fmt: skip
    port = str(free_port())
    ranks = []
    for rank in range(arguments.ranks):
        own = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.ranks),
            "LOCAL_SIZE": str(arguments.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate() for process in ranks]
    if any(process.returncode for process in ranks):
        reason = next(errors for _, errors in outputs if errors).strip().splitlines()[-1]
        found: dict[str, Any] = {"error": reason}
    else:
        found = json.loads(outputs[0][0].splitlines()[-1])
    print(f"{case.name}: {found}", file=sys.stderr, flush=True)
    return {**asdict(case), **found}


def measure(case: Case, arguments: argparse.Namespace) -> None:
    """Entry point of a rank; rank 0 prints the result."""
    ranks = discover()
    export_environment(ranks, os.environ)

    from muomni.distributed.deepspeed_import import import_deepspeed

    import_deepspeed()
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.engine.process_group import process_group
    from muomni.training.session import Request, open_loop, prepare

    overrides: dict[str, Any] = {"data": {"root": arguments.data}, "precision": arguments.precision}
    for text in (*case.overrides, *arguments.overrides):
        overrides = merge(overrides, parse_override(text))
    config = resolve("thinker", arguments.preset, None, overrides)
    engine_json = merge(read_engine_json(ENGINES / f"zero{case.zero}.json"), case.engine)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        session = prepare(Request(config, run, run, engine_json, "never", quiet=True), ranks)
        predicted = predict(session)
        with process_group(session.device):
            loop = open_loop(session)
            loop.engine.train()
            result = time_steps(loop, arguments.warm_up, arguments.steps)
            loop.engine.deepspeed.destroy()
    if ranks.is_main:
        print(json.dumps({**result, "predicted_gib": predicted}), flush=True)


def predict(session: Any) -> float | None:
    """GiB of a step according to the dry run; None if it predicts none for these settings."""
    from muomni.training.planning.dry_run import find_device, own_plan, preview

    plan = own_plan(session, preview(session, find_device(session)))
    return None if plan is None else plan.step_peak / GIB


def time_steps(loop: Any, num_warm_up: int, num_steps: int) -> dict[str, float | None]:
    """Speed and memory of `num_steps` steps after `num_warm_up` ones."""
    import torch

    is_gpu = loop.parts.device.type == "cuda"
    for _ in range(num_warm_up):
        loop.train_step()
    loop.throughput.take(loop.state.step, loop.loader)
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    loop.throughput.start(loop.state.step)
    for _ in range(num_steps):
        loop.train_step()
    metrics = loop.throughput.take(loop.state.step, loop.loader).metrics
    return {
        "tokens_per_s": metrics["tokens_per_s"],
        "step_ms": 1000 * metrics["step_time_s"],
        "mfu": metrics.get("mfu"),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if is_gpu else None,
    }


if __name__ == "__main__":
    main()
