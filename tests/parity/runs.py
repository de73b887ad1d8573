"""Toy runs for the cells of the parity matrix: data, sizes, and 20 training steps."""

import gc
from pathlib import Path
from typing import Any

from muomni.config.loading import merge, run_config
from muomni.config.names import ENGINES
from muomni.config.run import RunConfig
from muomni.data.text.tokenizer import Tokenizer
from muomni.distributed.discovery import discover
from muomni.models.layers.blocks import BlockRunner
from muomni.observe.recorder import Kind, RunInfo, Status
from muomni.training.engine.ds_config import read_engine_json
from muomni.training.guard import StopFlag
from muomni.training.session import Request, open_loop, prepare
from tests.conversations import write_sft_dataset, write_tts_dataset, write_upstream
from tests.corpora import write_text_dataset, write_tokenizer
from tests.media_corpora import write_image_dataset, write_speech_dataset
from tests.parity.cells import NUM_UNITS, Cell
from tests.parity.reference import Curve
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run

NUM_STEPS = 20
# Small enough that 16-bit rounding errors do not make the curves diverge within these steps.
LR = 1e-3
# Adam is invariant to the gradient scale, unless eps is as large as small gradients.
EPS = 1e-4
# The default sizes, in elements, suit models of 10^8 parameters and more. With these, the gradients of toy
# models fill several buckets, too, and ZeRO-3 partitions all weights except those of norms.
_TOY_SIZES = {
    "reduce_bucket_size": 5000,
    "allgather_bucket_size": 5000,
    "stage3_prefetch_bucket_size": 500,
    "stage3_param_persistence_threshold": 100,
    "stage3_max_live_parameters": 10_000,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 32}


def write_data(root: Path) -> Path:
    """Write datasets of all tasks, a tokenizer, and to `run` the exports that talker and sft load."""
    write_text_dataset(root / "text")
    write_speech_dataset(root / "speech", num_train=64)
    write_image_dataset(root / "images")
    write_tts_dataset(root / "tts", num_each=16)
    write_sft_dataset(root / "sft")
    write_tokenizer(root / "tokenizer.model")
    write_upstream(root / "run", Tokenizer.load(root / "tokenizer.model"))
    return root


def parity_config(cell: Cell, root: Path) -> RunConfig:
    """The run config of a cell; its curve must not depend on precision or activation checkpointing."""
    changes: dict[str, Any] = {
        "precision": cell.precision,
        "fp16": {"initial_scale_power": 8},
        "batch": _batch(cell),
        "optim": {"lr": LR, "eps": EPS, "warmup_fraction": 0.1},
        "training": {
            "max_steps": NUM_STEPS, "activation_checkpointing": cell.is_checkpointing,
        },
    }  # fmt: skip
    if cell.stage == "thinker-moe":
        changes["model"] = {"moe": _EXPERTS}
    if cell.stage == "audio_encoder":
        # Character labels do not all fit, so a step of one micro-batch could have none.
        changes["options"] = {"num_merges": None}
    if cell.stage == "vision_encoder":
        # At the default temperature of 0.07, rounding errors dominate with four pairs per micro-batch.
        changes["model"] = {"initial_temperature": 0.2}
        # At 1e-3 the gradient grows tenfold within these steps, and rounding errors grow with it.
        changes["optim"]["lr"] = 3e-4
    if cell.stage.startswith("thinker"):
        return thinker_config(root, changes)
    if cell.stage in ("talker", "sft"):
        return omni_run(cell.stage, root, changes)
    return stage_config(cell.stage, root, changes)


def _batch(cell: Cell) -> dict[str, int]:
    """The same global batch for every cell of a stage, and micro-batches that divide it."""
    size = cell.units_per_micro_batch
    if cell.stage.startswith("thinker"):
        return {"global_tokens": NUM_UNITS * 64, "micro_sequences": size}
    if cell.stage == "sft":
        return {"global_tokens": NUM_UNITS * 22, "micro_sequences": size}
    if cell.stage in ("vision_encoder", "codec"):
        return {"global_samples": NUM_UNITS * 4, "micro_samples": size * 4}
    # As few as the longest clip allows, or all of a step.
    longest = 2 if cell.stage == "audio_encoder" else 1
    return {
        "global_seconds": 4 * longest,
        "micro_seconds": (100, longest)[cell.num_accumulation > 1],
    }


def engine_json(cell: Cell) -> dict[str, Any]:
    """The shipped engine JSON of the ZeRO stage, with toy sizes and maximum expert parallelism."""
    content = read_engine_json(ENGINES / f"zero{cell.zero}.json")
    section = content["zero_optimization"]
    if cell.zero:  # each stage ignores the sizes of others
        section |= _TOY_SIZES
    if cell.stage == "thinker-moe":
        content["expert_parallel"] = {"autoep_size": "auto"}
    return content


class CurveRecorder:
    """Appends logged steps to a curve."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def open(self, info: RunInfo) -> None: ...

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        self.curve.losses.append(metrics["loss"])
        self.curve.grad_norms.append(metrics["grad_norm"])

    def artifact(self, path: Path, folder: str) -> None: ...

    def close(self, status: Status) -> None: ...


def run_cell(cell: Cell, root: Path, run: Path, changes: dict[str, Any] | None = None) -> Curve:
    """Run a cell with the real session, engine, and loop; returns the logged curve. Call it on all ranks.

    Validation, checkpoints, and exports are skipped, as other tests cover them. `changes` to the config must
    not change the curve.
    """
    config = parity_config(cell, root)
    if changes:
        config = run_config(merge(config.model_dump(mode="json"), changes))
    session = prepare(Request(config, run, root / "run", engine_json(cell), "never"), discover())
    loop = open_loop(session)
    curve = Curve([], [])

    try:
        recomputing = [
            bool(part.recomputed_blocks)
            for part in loop.engine.task.modules()
            if isinstance(part, BlockRunner)
        ]
        assert recomputing and set(recomputing) == {cell.is_checkpointing}
        loop.recorders = [CurveRecorder(curve)]
        loop.train(StopFlag())
    finally:
        loop.engine.deepspeed.destroy()
        del loop
        gc.collect()
    return curve
