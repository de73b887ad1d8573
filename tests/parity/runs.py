"""What the cells of the parity matrix train: toy data, toy sizes, 20 steps; and how a rank runs one."""

import gc
from pathlib import Path
from typing import Any

from muomni.config.loading import CONFIG_ROOT
from muomni.config.run import RunConfig
from muomni.data.text.tokenizer import Tokenizer
from muomni.distributed.discovery import discover
from muomni.models.layers.recompute import BlockRunner
from muomni.observe.recorder import Kind, RunInfo, Status
from muomni.training.engine.ds_config import read_engine_json
from muomni.training.guard import StopFlag
from muomni.training.session import Request, open_loop, prepare
from tests.conversations import write_sft_dataset, write_tts_dataset, write_upstream
from tests.corpora import write_text_dataset, write_tokenizer
from tests.media_corpora import write_image_dataset, write_speech_dataset
from tests.parity.cells import Cell
from tests.parity.reference import Curve
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run

NUM_STEPS = 20
# Small enough that rounding to 16 bits does not add up to another course within the steps.
LR = 1e-3
# Adam does not see a gradient that is wrong by a factor, unless this is as large as small gradients are.
EPS = 1e-4
# The shipped sizes, in elements, are for models of 10^8 parameters and more. These are for the toys: so
# gradients fill several buckets here, too, and ZeRO-3 divides all weights but those of norms.
_TOY_SIZES = {
    "reduce_bucket_size": 5000,
    "allgather_bucket_size": 5000,
    "stage3_prefetch_bucket_size": 500,
    "stage3_param_persistence_threshold": 100,
    "stage3_max_live_parameters": 10_000,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 32}


def write_data(root: Path) -> Path:
    """Datasets of all tasks, a tokenizer, and in `run` the exports that talker and sft load."""
    write_text_dataset(root / "text")
    write_speech_dataset(root / "speech", num_train=64)
    write_image_dataset(root / "images")
    write_tts_dataset(root / "tts", num_each=16)
    write_sft_dataset(root / "sft")
    write_tokenizer(root / "tokenizer.model")
    write_upstream(root / "run", Tokenizer.load(root / "tokenizer.model"))
    return root


def parity_config(cell: Cell, root: Path) -> RunConfig:
    """The run of a cell; precision and recomputation are the only settings that its curve may not show."""
    changes: dict[str, Any] = {
        "precision": cell.precision,
        "fp16": {"initial_scale_power": 8},
        "batch": {"micro_batches_per_step": cell.group},
        "optim": {"lr": LR, "eps": EPS, "warmup_fraction": 0.1},
        "training": {
            "max_steps": NUM_STEPS, "activation_checkpointing": cell.is_checkpointing,
        },
    }  # fmt: skip
    if cell.stage == "thinker-moe":
        changes["model"] = {"moe": _EXPERTS}
    if cell.stage == "audio_encoder":
        # Labels that are characters do not all fit, and a step of one micro-batch may be left without.
        changes["options"] = {"num_merges": None}
    if cell.stage == "vision_encoder":
        # At the temperature of real runs, 0.07, rounding decides among the four pairs of a micro-batch.
        changes["model"] = {"initial_temperature": 0.2}
        # At 1e-3 its gradient grows tenfold within the steps, and every rounding error with it.
        changes["optim"]["lr"] = 3e-4
    if cell.stage.startswith("thinker"):
        return thinker_config(root, changes)
    if cell.stage in ("talker", "sft"):
        return omni_run(cell.stage, root, changes)
    return stage_config(cell.stage, root, changes)


def engine_json(cell: Cell) -> dict[str, Any]:
    """The engine JSON that ships for this ZeRO stage, with sizes for toys.

    Experts are divided over as many ranks as can be.
    """
    content = read_engine_json(CONFIG_ROOT / "deepspeed" / f"zero{cell.zero}.json")
    section = content["zero_optimization"]
    section |= {name: size for name, size in _TOY_SIZES.items() if name in section}
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


def run_cell(cell: Cell, root: Path, run: Path) -> Curve:
    """The logged curve of a cell, by the real session, engine and loop; call it on all of its ranks.

    Validation, checkpoints and exports, which other tests look at, are left out.
    """
    config = parity_config(cell, root)
    session = prepare(Request(config, run, root / "run", engine_json(cell), "never"), discover())
    loop = open_loop(session)
    curve = Curve([], [])

    try:
        recomputing = [
            bool(part.recomputed_positions)
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
