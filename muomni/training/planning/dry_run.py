"""Dry run: report the config, model sizes, number of steps, and predicted memory per rank."""

import itertools
import os
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import yaml
from torch import nn

from muomni.config.names import ENGINES
from muomni.data.views.base import Batch
from muomni.distributed.discovery import num_local_ranks
from muomni.errors import ConfigError
from muomni.io.table import format_table
from muomni.models.layers.blocks import describe_recomputation
from muomni.training.engine import expert_parallel
from muomni.training.engine.ds_config import (
    gradient_format,
    read_engine_json,
    zero_settings,
    zero_stage,
)
from muomni.training.engine.offload import offload_of
from muomni.training.engine.precision import DTYPES
from muomni.training.optim.groups import describe_parameters, parameter_groups
from muomni.training.planning.gradient_layout import Setup, Sizes
from muomni.training.planning.live_bytes import storage_bytes
from muomni.training.planning.memory_plan import (
    AVERAGE,
    MASTER,
    MOMENTS,
    PARTS,
    MemoryPlan,
    predict,
)
from muomni.training.planning.setup import count_parameters, describe_global_batch
from muomni.training.planning.step_trace import StepTrace, Stretch, trace_step
from muomni.training.session import Session

MIB = 2**20
# Micro-batches to read per step; with more accumulation, they repeat.
_MAX_READ = 8


@dataclass(frozen=True, slots=True)
class Device:
    """The device of a rank. `memory` is in bytes, None if unknown.

    `host_memory` is a GPU rank's share of the host memory.
    """

    kind: str
    memory: int | None
    host_memory: int | None = None

    @property
    def memory_text(self) -> str:
        return "unknown" if self.memory is None else f"{self.memory / MIB:,.0f} MiB"


def find_device(session: Session, is_planned: bool = False, gpu_gib: float | None = None) -> Device:
    """Return the device of each rank: of this machine, or a GPU elsewhere that the run is planned for."""
    if gpu_gib is not None:
        return Device("cuda", int(gpu_gib * 2**30))
    if is_planned and session.device.type != "cuda":
        return Device("cuda", None)
    num_local = num_local_ranks(os.environ) or session.ranks.world_size
    per_rank = psutil.virtual_memory().total // num_local
    if session.device.type == "cuda":
        total = torch.cuda.get_device_properties(session.device).total_memory
        return Device("cuda", total, None if is_planned else per_rank)
    return Device("cpu", per_rank)


@dataclass(frozen=True, slots=True)
class Preview:
    """A trace of the first step of this rank, and the memory plans derived from it."""

    task: nn.Module
    batches: list[Batch]
    trace: StepTrace
    plans: list[MemoryPlan]


def preview(session: Session, device: Device) -> Preview:
    """Read the batches of the first step, trace it with fake tensors, and predict its memory."""
    with torch.device("meta"):
        task = session.stage.build()
    batches = read_step(session)
    trace = trace_step(
        session.stage, batches, session.precision, session.ranks.world_size, device.kind
    )
    return Preview(task, batches, trace, predict_memory(session, task, trace, device))


def check_memory(session: Session, seen: Preview, device: Device) -> None:
    """Raise ConfigError if the predicted memory of the run exceeds the device, or is unknown."""
    plan = own_plan(session, seen)
    if plan is None:
        raise ConfigError("memory cannot be predicted with expert_parallel; remove --check-memory")
    fits = fits_device(plan, device)
    if fits is None:
        raise ConfigError("--check-memory needs the memory of the GPUs; add --gpu-gib")
    if not fits:
        most = max(plan.parts, key=lambda part: plan.parts[part]).replace("_", " ")
        needed, host = plan.peak / MIB, plan.host_peak / MIB
        on_host = f", and {host:,.0f} MiB of host memory" if host else ""
        raise ConfigError(
            f"a rank needs {needed:,.0f} MiB, mostly for {most}{on_host}, but its {device.kind} has "
            f"{device.memory_text}: lower the micro-batch size (batch.*), set "
            "training.activation_checkpointing, or choose another --deepspeed_config "
            "(--dry-run shows the memory for each)"
        )


def own_plan(session: Session, seen: Preview) -> MemoryPlan | None:
    """The plan for the DeepSpeed JSON of the run; None if it cannot be predicted."""
    return next((plan for plan in seen.plans if _is_own(plan, session)), None)


def describe(session: Session, device: Device, seen: Preview | None = None) -> dict[str, Any]:
    """Print the resolved config, the parameters, and the predicted memory; returns metrics."""
    config = session.request.config
    seen = preview(session, device) if seen is None else seen
    task, batches, trace, plans = seen.task, seen.batches, seen.trace, seen.plans
    if session.ranks.is_main:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        print(*describe_parameters(task, config.optim), sep="\n")
        print(describe_global_batch(session))
        print(*table(session, plans, device), sep="\n", flush=True)
    num_steps, unit = session.feed.num_steps(1), session.stage.view().unit
    units = sum(float(batch["units"]) for batch in batches) / len(batches)
    return {
        "stage": config.stage,
        "parameters": count_parameters(task),
        "trainable_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "precision": session.precision,
        "device": session.device.type,
        "ranks": session.ranks.world_size,
        "train_samples": session.feed.num_samples,
        "val_samples": session.val.num_included if session.val else 0,
        "steps_per_epoch": num_steps,
        "steps": session.num_steps,
        "micro_batches_per_rank": len(batches),
        f"{unit}_per_step": units * len(batches) * session.ranks.world_size,
        "flops_per_step": trace.flops * session.ranks.world_size,
        "first_micro_batch": {key: list(value.shape) for key, value in batches[0].items()},
        "memory": [as_metrics(plan, device) for plan in plans],
    }


def read_step(session: Session) -> list[Batch]:
    """Return the micro-batches of this rank's first step; after `_MAX_READ`, they repeat."""
    read = itertools.cycle(read.batch for read in session.feed.read(0, _MAX_READ))
    return list(itertools.islice(read, session.feed.num_micro_batches(0)))


def model_sizes(session: Session, task: nn.Module) -> Sizes:
    """Return the parameter sizes of a task by optimizer group."""
    groups = parameter_groups(task, session.request.config.optim)
    numbers = {id(p): n for n, p in enumerate(p for p in task.parameters() if p.requires_grad)}
    return Sizes(
        groups=tuple(tuple(p.numel() for p in group.parameters) for group in groups),
        # Muon stores one momentum, AdamW two moments.
        num_moments=tuple(1 if group.is_muon else 2 for group in groups),
        order=tuple(numbers[id(p)] for group in groups for p in group.parameters),
        frozen=tuple(p.numel() for p in task.parameters() if not p.requires_grad),
        buffer_bytes=storage_bytes(task.buffers()),
    )


def predict_memory(
    session: Session, task: nn.Module, trace: StepTrace, device: Device
) -> list[MemoryPlan]:
    """Return memory plans per rank: for the run's own DeepSpeed JSON, and for the shipped ones.

    Offload configs are included for GPUs only, since on CPUs they move nothing. Empty with expert parallelism,
    which is not modeled.
    """
    config, own_json = session.request.config, session.request.engine_json
    if expert_parallel.is_enabled(own_json):
        return []
    names = {(0, False): "zero0"}
    if config.optim.name != "muon":
        names |= {(stage, False): f"zero{stage}" for stage in (1, 2, 3)}
        if device.kind == "cuda":
            names |= {(stage, True): f"zero{stage}_offload" for stage in (2, 3)}
    engines = {key: read_engine_json(ENGINES / f"{name}.json") for key, name in names.items()}
    engines[_layout(own_json)] = own_json
    sizes = model_sizes(session, task)
    return [
        predict(zero_settings(engine), sizes, trace, _setup(session, engine, device))
        for _, engine in sorted(engines.items())
    ]


def predict_state(session: Session, task: nn.Module) -> MemoryPlan | None:
    """The plan of the run without activations, which would need a trace; None with expert parallelism."""
    engine_json = session.request.engine_json
    if expert_parallel.is_enabled(engine_json):
        return None
    sizes = model_sizes(session, task)
    backward = [Stretch({}, number) for number in reversed(range(len(sizes.trained)))]
    trace = StepTrace((*backward, Stretch({}, None)), before={}, resident=0, flops=0)
    setup = _setup(session, engine_json, Device(session.device.type, None))
    return predict(zero_settings(engine_json), sizes, trace, setup)


def _setup(session: Session, engine_json: dict[str, Any], device: Device) -> Setup:
    summed, reduced = gradient_format(engine_json, session.precision)
    return Setup(
        session.ranks.world_size,
        session.feed.accumulates,
        DTYPES[session.precision].itemsize,
        DTYPES[summed].itemsize,
        DTYPES[reduced].itemsize,
        session.request.config.training.ema_decay is not None,
        is_gpu=device.kind == "cuda",
    )


def _layout(engine_json: dict[str, Any]) -> tuple[int, bool]:
    """The key of a table row: ZeRO stage, and whether it offloads."""
    return zero_stage(engine_json), bool(offload_of(engine_json))


def _is_own(plan: MemoryPlan, session: Session) -> bool:
    return (plan.zero_stage, bool(plan.offload)) == _layout(session.request.engine_json)


def table(session: Session, plans: list[MemoryPlan], device: Device) -> list[str]:
    """Format the plans as aligned text, one line each."""
    config = session.request.config
    if not plans:
        return ["memory cannot be predicted with expert_parallel"]
    kind = "GPU" if device.kind == "cuda" else "CPU rank"
    recomputed = describe_recomputation(config.training.activation_checkpointing)
    head = (
        f"memory per {kind} in MiB, {session.ranks.world_size} in total, {session.precision}"
        f"{recomputed and ', '}{recomputed} "
        f"(a {kind} has {device.memory_text}):"
    )
    hidden = set() if config.training.ema_decay is not None else {AVERAGE}
    parts = [part for part in PARTS if part not in hidden]
    columns = (part.replace("_", " ") for part in parts)
    headers = ["ZeRO", *columns, "peak", "host", "fits", "peak at", "offload"]
    rows = []
    for plan in plans:
        own = "*" if _is_own(plan, session) else ""
        sizes = [f"{plan.parts[part] / MIB:,.1f}" for part in parts]
        fits = {None: "?", True: "yes", False: "no"}[fits_device(plan, device)]
        sums = [f"{num_bytes / MIB:,.1f}" for num_bytes in (plan.peak, plan.host_peak)]
        row = [f"{plan.zero_stage}{own}", *sizes, *sums, fits, plan.peak_at, str(plan.offload)]
        rows.append(row)
    lines = format_table(headers, rows, align=">" * len(headers)).splitlines()
    foot = (
        "each part at its own peak; * is the DeepSpeed config of this run; host is offloaded memory"
    )
    if device.kind == "cpu":
        foot += " (on a CPU, part of the same memory)"
    return ["", head, *lines, foot]


def fits_device(plan: MemoryPlan, device: Device) -> bool | None:
    """Whether a plan fits device and host memory; None if the device memory is unknown.

    CPU ranks share one memory for both. Host memory is known for this machine only.
    """
    if device.memory is None:
        return None
    if device.kind == "cpu":
        return plan.peak + plan.host_peak <= device.memory
    fits_host = device.host_memory is None or plan.host_peak <= device.host_memory
    return plan.peak <= device.memory and fits_host


def as_metrics(plan: MemoryPlan, device: Device) -> dict[str, Any]:
    """Return a plan in bytes, for the JSON result."""
    state = sum(plan.parts[part] + plan.host.get(part, 0) for part in (MASTER, MOMENTS, AVERAGE))
    return {
        "zero_stage": plan.zero_stage,
        "offload": str(plan.offload),
        "parts_bytes": plan.parts,
        "host_parts_bytes": plan.host,
        "host_bytes": plan.host_peak,
        "optimizer_state_bytes": state,
        "peak_bytes": plan.peak,
        "peak_at": plan.peak_at,
        "device_bytes": device.memory,
        "fits": fits_device(plan, device),
    }
