"""What ranks do in the tests of GPUs, on any device: the default tests run the same on CPUs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.training.loop import Loop
from muomni.training.planning.dry_run import Device, own_plan, preview
from muomni.training.planning.live_bytes import LiveBytes
from muomni.training.session import Request, open_loop, prepare

# Steps until nothing is allocated, compiled, or measured for the first time.
NUM_WARM_UP = 3


@contextmanager
def opened(
    config: RunConfig, run: Path, engine_json: dict[str, Any], upstream: Path | None = None
) -> Iterator[Loop]:
    """The loop of a run, in training mode; its engine is destroyed afterward."""
    request = Request(config, run, upstream or run, engine_json, "never")
    loop = open_loop(prepare(request, discover()))
    try:
        loop.engine.train()
        yield loop
    finally:
        loop.engine.deepspeed.destroy()
        del loop
        gc.collect()


def steps_without_waits(
    config: RunConfig, run: Path, engine_json: dict[str, Any], upstream: Path | None = None
) -> str:
    """Train steps in which a GPU raises an error wherever the host waits for it; returns the device type."""
    with opened(config, run, engine_json, upstream) as loop:
        for _ in range(NUM_WARM_UP):
            loop.train_step()
        device = loop.parts.device
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                loop.train_step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return device.type


def peak_and_prediction(
    config: RunConfig, run: Path, engine_json: dict[str, Any]
) -> tuple[int, int]:
    """Peak bytes of this rank in a step, and those that the dry run predicts for it."""
    session = prepare(Request(config, run, run, engine_json, "never"), discover())
    is_gpu = session.device.type == "cuda"
    seen = preview(session, Device("cuda" if is_gpu else "cpu", None))
    plan = own_plan(session, seen)
    assert plan is not None
    predicted = plan.step_peak
    if is_gpu:
        with opened(config, run, engine_json) as loop:
            for _ in range(NUM_WARM_UP):
                loop.train_step()
            torch.cuda.reset_peak_memory_stats()
            loop.train_step()
            return torch.cuda.max_memory_allocated(), predicted
    with LiveBytes(lambda: "all") as live, opened(config, run, engine_json) as loop:
        loop.train_step()
        live.start_peak()
        loop.train_step()
        return sum(live.peak.values()), predicted
