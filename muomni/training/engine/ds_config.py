"""Complete a DeepSpeed JSON from the run config, and reject one that contradicts it.

The JSON holds engine settings only (ZeRO stage, buckets, offload, expert parallelism). Batch sizes,
precision, clipping, optimizer, and schedule belong to the run config. DeepSpeed silently ignores unknown
sections; here they are errors.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from muomni.config.loading import did_you_mean, validate
from muomni.config.run import RunConfig
from muomni.errors import ConfigError
from muomni.training.engine.offload import Offload, offload_of

ENGINE_SECTIONS = (
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "expert_parallel", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "flops_profiler", "comms_logger", "aio", "steps_per_print",
    "seq_parallel_communication_data_type", "disable_allgather",
    "dump_state", "memory_breakdown", "timers", "checkpoint", "data_types",
)  # fmt: skip

OWNED_BY_RUN_CONFIG = {
    "train_batch_size": "the global batch in section batch",
    "train_micro_batch_size_per_gpu": "the micro-batch in section batch",
    "gradient_accumulation_steps": "the global batch in section batch",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "precision and fp16",
    "bf16": "precision",
    "bfloat16": "precision",
    "torch_autocast": "precision",
    "amp": "precision",
    # DeepSpeed applies these only to programs that call its own functions.
    "compile": "training.compile",
    "activation_checkpointing": "training.activation_checkpointing",
}


def read_engine_json(path: Path) -> dict[str, Any]:
    """Read and check an engine JSON; raises ConfigError for anything but engine settings."""
    if not path.is_file():
        raise ConfigError(f"DeepSpeed config {path} does not exist; see configs/deepspeed/")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise ConfigError(
            f"DeepSpeed config {path} is not valid JSON ({error}); correct it"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"DeepSpeed config {path} must contain an object, not a {type(content).__name__}"
        )
    for section in content:
        if section in OWNED_BY_RUN_CONFIG:
            raise ConfigError(
                f"DeepSpeed config {path} sets '{section}', which the run config owns; remove it there "
                f"and set {OWNED_BY_RUN_CONFIG[section]} instead"
            )
        if section not in ENGINE_SECTIONS:
            hint = did_you_mean(section, ENGINE_SECTIONS)
            raise ConfigError(f"DeepSpeed config {path} has an unknown section '{section}'{hint}")
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f'zero_optimization in {path} must be an object like {{"stage": 2}}, not {zero!r}'
        )
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"zero_optimization.stage in {path} is {stage!r}; it must be 0, 1, 2 or 3"
        )
    # DeepSpeed also rejects misspelled keys of this section, but with a traceback on every rank.
    validate(DeepSpeedZeroConfig, zero, f"zero_optimization of {path}")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a repeated key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' occurs twice")
    return content


def zero_stage(engine_json: dict[str, Any]) -> int:
    return int(engine_json.get("zero_optimization", {}).get("stage", 0))


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """The ZeRO settings that determine memory use; sizes in elements."""

    stage: int
    overlaps: bool
    reduce_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    max_reuse_distance: int
    sub_group_size: int
    offload: Offload


def zero_settings(engine_json: dict[str, Any]) -> ZeroSettings:
    """The ZeRO settings of an engine JSON, with DeepSpeed's defaults for missing keys."""
    zero = DeepSpeedZeroConfig(**engine_json.get("zero_optimization", {}))
    return ZeroSettings(
        int(zero.stage), bool(zero.overlap_comm), int(zero.reduce_bucket_size),
        int(zero.prefetch_bucket_size), int(zero.param_persistence_threshold),
        int(zero.max_reuse_distance), int(zero.sub_group_size), offload_of(engine_json),
    )  # fmt: skip


def complete(
    engine_json: dict[str, Any],
    config: RunConfig,
    precision: str,
    accumulates: bool,
    world_size: int,
) -> dict[str, Any]:
    """The full DeepSpeed config: engine settings from the JSON, all else from the run config.

    The number of micro-batches of a step may vary, so DeepSpeed learns only whether there are several
    (`accumulates`), which decides about its buffers; the engine marks the last one of each step.
    """
    num_accumulation = 2 if accumulates else 1
    return {
        **engine_json,
        # DeepSpeed uses sample counts only in its own logs; here one micro-batch counts as one sample.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_accumulation,
        "train_batch_size": num_accumulation * world_size,
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # Offloaded state uses the same optimizer (muomni/training/engine/offload.py).
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": engine_json.get("steps_per_print", 10**12),
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": config.fp16.initial_scale_power,
            "loss_scale_window": config.fp16.scale_window,
            "min_loss_scale": config.fp16.min_scale,
            "hysteresis": config.fp16.hysteresis,
        },
    }
