"""ZeRO-Offload (Ren et al. 2021, arXiv:2101.06840): optimizer state, and under ZeRO 3 weights, in host memory.

The engine JSON enables it (`offload_optimizer`, `offload_param`). The offloaded update runs torch's fused
AdamW, which needs no compiled op; `benchmarks/offloaded_update.py` compares it with DeepSpeed's own.
"""

from dataclasses import dataclass
from typing import Any

from muomni.errors import ConfigError

_SECTIONS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
# DeepSpeed options of offload that this project does not test.
_UNTESTED = ("super_offload", "pipeline_read", "pipeline_write", "fast_init")


@dataclass(frozen=True, slots=True)
class Offload:
    """What a rank keeps in host memory, and whether that is page-locked."""

    optimizer: bool = False
    parameters: bool = False
    has_pinned_optimizer: bool = False
    has_pinned_parameters: bool = False

    def __bool__(self) -> bool:
        return self.optimizer or self.parameters

    def __str__(self) -> str:
        parts = {"optimizer": self.optimizer, "parameters": self.parameters}
        return " and ".join(part for part, is_on in parts.items() if is_on)


def offload_of(engine_json: dict[str, Any]) -> Offload:
    """What an engine JSON offloads; DeepSpeed pins memory by default."""
    optimizer, parameters = (_section(engine_json, name) for name in _SECTIONS)
    return Offload(
        bool(optimizer), bool(parameters),
        bool(optimizer) and optimizer.get("pin_memory", True),
        bool(parameters) and parameters.get("pin_memory", True),
    )  # fmt: skip


def check_support(engine_json: dict[str, Any]) -> None:
    """Raise ConfigError for an offload that the ZeRO stage does not support, or that is not tested here."""
    zero = engine_json.get("zero_optimization", {})
    for old in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"):
        if zero.get(old) is not None:
            raise ConfigError(
                f"zero_optimization.{old} is deprecated in DeepSpeed; use "
                f'offload_optimizer or offload_param with {{"device": "cpu"}} in the DeepSpeed config'
            )
    for name, stages in _SECTIONS.items():
        section = _section(engine_json, name)
        if section:
            _check_section(name, section, zero.get("stage", 0), stages)
    if not offload_of(engine_json):
        return
    for name, is_there in (
        ("zenflow", zero.get("zenflow")),
        ("data_types", "data_types" in engine_json),
    ):
        if is_there:
            raise ConfigError(
                f"{name} in the DeepSpeed config does not work with offload; remove one of them"
            )
    if engine_json.get("zero_force_ds_cpu_optimizer"):
        raise ConfigError(
            "zero_force_ds_cpu_optimizer selects DeepSpeed's compiled CPUAdam, but offloaded weights are "
            "updated by torch's fused AdamW, which is as fast; set it to false in the DeepSpeed config"
        )


def _section(engine_json: dict[str, Any], name: str) -> dict[str, Any]:
    """The section of an enabled offload, else an empty one."""
    section = engine_json.get("zero_optimization", {}).get(name) or {}
    return section if section.get("device", "none") != "none" else {}


def _check_section(key: str, section: dict[str, Any], stage: int, stages: tuple[int, ...]) -> None:
    name = f"zero_optimization.{key}"
    if section["device"] == "nvme":
        raise ConfigError(
            f"{name} offloads to nvme, which is not supported; set its device to cpu in the DeepSpeed config"
        )
    if stage not in stages:
        needed = " or ".join(map(str, stages))
        raise ConfigError(
            f"{name} needs ZeRO {needed}, but the DeepSpeed config has stage {stage}; "
            f"use configs/deepspeed/zero{stages[-1]}_offload.json, or remove it"
        )
    untested = [key for key in _UNTESTED if section.get(key)]
    if section.get("ratio", 1.0) != 1.0:
        untested.append("ratio")
    if untested:
        raise ConfigError(
            f"{name}.{untested[0]} is not supported; remove it from the DeepSpeed config"
        )
