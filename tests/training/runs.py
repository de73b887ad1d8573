"""Runs of the real session and loop inside a warm rank, for tests of training."""

import gc
from pathlib import Path
from typing import Any

from muomni.config.loading import merge, run_config
from muomni.config.names import ENGINES
from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.observe.metrics_log import read_lines
from muomni.training.engine.ds_config import read_engine_json
from muomni.training.session import Request, open_loop, prepare
from tests.observe.mlflow_runs import empty_mlflow_store

TINY_THINKER = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "max_positions": 128,
}  # fmt: skip


def thinker_config(data: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """A short thinker run: 20 steps of 4 sequences of 64 tokens, logged at each step."""
    content: dict[str, Any] = {
        "stage": "thinker",
        "preset": "test",
        "precision": "fp32",
        "data": {"root": str(data)},
        "batch": {"seq_len": 64, "global_tokens": 256, "micro_sequences": 1, "shuffle_window": 64},
        "optim": {"lr": 3e-3},
        "training": {
            "max_steps": 20, "log_every": 1, "validate_every": 1000, "save_every": 1000,
            "validate_samples": 8,
        },
        "model": TINY_THINKER,
    }  # fmt: skip
    return run_config(merge(content, changes or {}))


def train(
    config: RunConfig,
    run: Path,
    zero: str | dict[str, Any] = "zero1",
    resume: str = "auto",
    upstream: Path | None = None,
) -> dict[str, Any]:
    """Train in this rank's process group; returns the result, with the `curve` of logged metrics."""
    engine_json = zero
    if isinstance(engine_json, str):
        engine_json = read_engine_json(ENGINES / f"{engine_json}.json")
    store = run.resolve().parent / "mlflow.db"
    if discover().is_main and not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_bytes(empty_mlflow_store())
    session = prepare(Request(config, run, upstream or run, engine_json, resume), discover())
    loop = open_loop(session)
    try:
        result = loop.run()
    finally:
        loop.engine.deepspeed.destroy()
        del loop
        gc.collect()
    lines = read_lines(run / config.stage / "metrics.jsonl")
    curve = [line for line in lines if line["kind"] == "train"]
    return {**result, "curve": curve, "losses": [line["loss"] for line in curve]}
