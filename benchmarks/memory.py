"""Memory predicted by a dry run, compared with the memory of CPU ranks.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --data data/sample --json benchmarks/results/memory.json

The prediction is that of `launch/train.py --dry-run`. Ranks with the same settings then train some steps
through the real session, engine, and loop. `measured` is the growth of peak resident memory (VmHWM) from a
baseline before the model is built, maximum over ranks, without validation, checkpoints, and logging.

Much code is imported lazily when an engine is first used. The baseline is therefore taken after a minimal
Thinker (hidden size 8, one layer, sequences of 16 tokens) has trained two steps in the same process group
and been freed. A process needs `start` (before it) and `loaded` (taken by it) in addition to the prediction.
`code` is the part of `measured` from library files that the minimal Thinker did not touch (RssFile), such as
convolution kernels.

Allocators keep freed memory, which would inflate the measurement. Ranks therefore run with
MALLOC_MMAP_THRESHOLD_=65536 (larger tensors are returned to the system when freed; a fixed threshold also
does not grow), MALLOC_TRIM_THRESHOLD_=65536, and MKL_DISABLE_FAST_MM=1 (no buffers between matrix
multiplications). --as-is disables these settings.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from muomni.config.loading import merge, parse_override, resolve
from muomni.config.names import ENGINES
from muomni.distributed.discovery import discover, export_environment, free_port
from muomni.errors import MachineError, exit_on_error

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
LEAN_ALLOCATION = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1",
}  # fmt: skip
MINIMAL = (
    "model.hidden_size=8", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1",
    "model.head_dim=8", "model.intermediate_size=8", "batch.seq_len=16", "batch.micro_sequences=1",
)  # fmt: skip
# A step of preset small takes 15 minutes on one core; use one micro-batch per rank.
FEW_MICRO_BATCHES = ("batch.micro_sequences=2", "batch.global_tokens=4096")


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    stage: str
    preset: str
    ranks: int = 1
    zero: int = 1
    precision: str = "fp32"
    steps: int = 4
    overrides: tuple[str, ...] = ()
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or f"{self.stage} {self.preset}"


CASES = (
    *(Case("thinker", preset, n) for preset in ("nano", "tiny") for n in (1, 2)),
    *(Case("thinker", "small", n, steps=2, overrides=FEW_MICRO_BATCHES) for n in (1, 2)),
    *(Case("thinker", "tiny", 2, zero) for zero in (0, 2, 3)),
    Case("thinker", "tiny", 2, precision="bf16"),
    Case(
        "thinker", "tiny", overrides=("training.activation_checkpointing=true",),
        name="thinker tiny, recomputed",
    ),
    *(Case(stage, "tiny") for stage in ("audio_encoder", "vision_encoder", "codec", "talker")),
)  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--upstream", default="runs/quickstart", help="run with a codec export")
    flags.add_argument("--only", default="", help="only cases whose label contains this text")
    flags.add_argument(
        "--as-is", action="store_true", help="keep the default settings of glibc and MKL"
    )
    flags.add_argument("--json", type=Path)
    flags.add_argument("--case", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    with exit_on_error("memory"):
        if arguments.case:
            measure(Case(**json.loads(arguments.case)), arguments)
            return
        rows = [row(case, arguments) for case in CASES if arguments.only in case.label]
    print_table(rows)
    if arguments.json:
        settings = {} if arguments.as_is else LEAN_ALLOCATION
        content = {"unit": "MiB", "settings": settings, "cases": rows, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def row(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict and measure one case in separate processes, in MiB."""
    predicted = predict(case, arguments)
    measured = train(case, arguments)
    print(f"{case.label}: {predicted:.1f} predicted, {measured}", file=sys.stderr, flush=True)
    return {**asdict(case), "label": case.label, "predicted": predicted, **measured}


def predict(case: Case, arguments: argparse.Namespace) -> float:
    """Peak memory of a rank according to the dry run, in MiB."""
    command = [
        sys.executable, str(ROOT / "launch/train.py"), "--stage", case.stage, "--dry-run",
        "--preset", case.preset, "--data", arguments.data, "--upstream", arguments.upstream,
        "--precision", case.precision, *case.overrides,
    ]  # fmt: skip
    environment = rank_environment(0, case.ranks, free_port(), {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"the dry run of {case.label} failed:\n{done.stderr[-2000:]}")
    plans = json.loads(done.stdout.splitlines()[-1])["memory"]
    return next(p["peak_bytes"] for p in plans if p["zero_stage"] == case.zero) / MIB


def train(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """Run `measure` on all ranks; return the result of the rank with the largest growth."""
    port = free_port()
    command = [
        sys.executable, __file__, "--case", json.dumps(asdict(case)), "--data", arguments.data,
        "--upstream", arguments.upstream,
    ]  # fmt: skip
    ranks = [
        subprocess.Popen(
            command, env=rank_environment(rank, case.ranks, port, {} if arguments.as_is else LEAN_ALLOCATION),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(case.ranks)
    ]  # fmt: skip
    results = []
    for process in ranks:
        output, errors = process.communicate()
        if process.returncode:
            raise MachineError(f"{case.label} failed:\n{errors[-2000:]}")
        results.append(json.loads(output.splitlines()[-1]))
    return max(results, key=lambda metrics: metrics["measured"])


def rank_environment(
    rank: int, world_size: int, port: int, extra: dict[str, str]
) -> dict[str, str]:
    """Environment variables of one rank on this machine."""
    own = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name not in LEAN_ALLOCATION}
    return {**inherited, **own, **extra}


def measure(case: Case, arguments: argparse.Namespace) -> None:
    """Entry point of a rank: train some steps, print the growth of resident memory in MiB."""
    ranks = discover()
    export_environment(ranks, os.environ)

    from muomni.distributed import collectives
    from muomni.distributed.deepspeed_import import import_deepspeed

    import_deepspeed()
    from muomni.training.engine.process_group import process_group

    minimal = Case("thinker", "nano", case.ranks, case.zero, case.precision, 2, MINIMAL)
    with tempfile.TemporaryDirectory() as folder:
        sessions = [open_session(c, arguments, ranks, Path(folder)) for c in (minimal, case)]
        with process_group(sessions[0].device):
            collectives.barrier()
            start = resident("VmRSS")
            train_steps(sessions[0], minimal.steps)
            gc.collect()
            baseline, mapped = resident("VmRSS"), resident("RssFile")
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
            train_steps(sessions[1], case.steps)
            measured, code = resident("VmHWM") - baseline, resident("RssFile") - mapped
            collectives.barrier()
    result = {"measured": measured, "code": code, "start": start, "loaded": baseline - start}
    print(json.dumps({name: round(value, 1) for name, value in result.items()}), flush=True)


def open_session(case: Case, arguments: argparse.Namespace, ranks: Any, folder: Path) -> Any:
    """Open the session of a case, without building its model."""
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.session import Request, prepare

    overrides: dict[str, Any] = {"data": {"root": arguments.data}, "precision": case.precision}
    for text in case.overrides:
        overrides = merge(overrides, parse_override(text))
    config = resolve(case.stage, case.preset, None, overrides)
    engine_json = read_engine_json(ENGINES / f"zero{case.zero}.json")
    upstream = Path(arguments.upstream)
    return prepare(Request(config, folder / "run", upstream, engine_json, "never"), ranks)


def train_steps(session: Any, num_steps: int) -> None:
    """Build model, engine, and loop, and train some steps."""
    from muomni.training.session import open_loop

    loop = open_loop(session)
    loop.engine.train()
    for _ in range(num_steps):
        loop.train_step()
    loop.engine.deepspeed.destroy()


def resident(name: str) -> float:
    """Read a memory value of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per case, in MiB; `error` is prediction / measurement - 1."""
    titles = ("predicted", "measured", "error", "code", "start", "loaded")
    print(f"{'case':28}{'ranks':>6}{'ZeRO':>5}{'':>6}" + "".join(f"{t:>11}" for t in titles))
    for r in rows:
        error = 100 * r["predicted"] / r["measured"] - 100
        metrics = {name: f"{r[name]:,.1f}" for name in titles if name != "error"}
        cells = ({**metrics, "error": f"{error:+.1f} %"}[name] for name in titles)
        head = f"{r['label']:28}{r['ranks']:>6}{r['zero']:>5}{r['precision']:>6}"
        print(head + "".join(f"{cell:>11}" for cell in cells))


if __name__ == "__main__":
    main()
