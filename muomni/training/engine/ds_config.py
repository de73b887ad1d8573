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

GRADIENT_DTYPES = ("fp32", "bf16", "fp16")

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
    _check_data_types(content.get("data_types", {}), stage, path)
    # DeepSpeed also rejects misspelled keys of this section, but with a traceback on every rank.
    validate(DeepSpeedZeroConfig, zero, f"zero_optimization of {path}")
    return content


def _check_data_types(section: Any, stage: int, path: Path) -> None:
    """Raise ConfigError unless `section` names a format in which this stage can add up gradients."""
    found = section.get("grad_accum_dtype", "fp32") if isinstance(section, dict) else None
    if found not in GRADIENT_DTYPES or set(section) - {"grad_accum_dtype"}:
        raise ConfigError(
            f'data_types in {path} must be an object like {{"grad_accum_dtype": "fp32"}} '
            f"({', '.join(GRADIENT_DTYPES)}), not {section!r}"
        )
    if stage == 0 and found != "fp32":
        raise ConfigError(
            f"data_types in {path} asks for gradients in {found}, but without ZeRO they are added up in fp32; "
            f"remove data_types, or use ZeRO 1"
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a repeated key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' occurs twice")
    return content


def gradient_format(engine_json: dict[str, Any], precision: str) -> tuple[str, str]:
    """The formats in which gradients are added up over micro-batches, and reduced over ranks.

    Both are fp32 for bf16 weights, whose 8 significant bits would lose small contributions, unless the JSON
    sets others. Offloaded gradients, and those of fp16 weights, which are scaled, keep the format of the
    weights.
    """
    stage = zero_stage(engine_json)
    own = precision if stage and (precision != "bf16" or offload_of(engine_json)) else "fp32"
    accumulated = engine_json.get("data_types", {}).get("grad_accum_dtype", own)
    reduced = "fp32" if precision == "bf16" or stage == 0 else precision
    return accumulated, engine_json.get("communication_data_type") or reduced


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
    accumulated, reduced = gradient_format(engine_json, precision)
    full = {key: value for key, value in engine_json.items() if key != "data_types"}
    if zero_stage(engine_json):  # else this project adds up gradients itself (engine/unsharded.py)
        full["data_types"] = {"grad_accum_dtype": accumulated}
    return {
        **full,
        "communication_data_type": reduced,
        # Its timer would wait for the device in each forward pass and each step.
        "timers": {"throughput": {"enabled": False}, **engine_json.get("timers", {})},
        # DeepSpeed uses sample counts only in its own logs; here one micro-batch counts as one sample.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_accumulation,
        "train_batch_size": num_accumulation * world_size,
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # Offloaded state uses the same optimizer (muomni/training/engine/offload.py).
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": engine_json.get("steps_per_print", 10**12),
        # Gradients are added to the fp32 sums as they are finished. Else ZeRO 1 would add them at hooks on
        # output tensors, which DeepSpeed does not find in a StageOutput.
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": config.fp16.initial_scale_power,
            "loss_scale_window": config.fp16.scale_window,
            "min_loss_scale": config.fp16.min_scale,
            "hysteresis": config.fp16.hysteresis,
        },
    }
