"""Engine JSON: engine settings only; contradictions and misspelled sections are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from muomni.config.names import ENGINES
from muomni.errors import ConfigError
from muomni.training.engine.ds_config import complete, gradient_format, read_engine_json
from tests.training.runs import thinker_config


@pytest.mark.parametrize("path", sorted(ENGINES.glob("*.json")), ids=str)
def test_every_committed_json_is_accepted_and_completed(path: Path) -> None:
    full = complete(read_engine_json(path), thinker_config(Path("data")), "bf16", True, 4)
    assert full["train_batch_size"] == 8
    assert full["gradient_accumulation_steps"] == 2
    assert full["gradient_clipping"] == 1.0
    assert full["bf16"]["enabled"] and not full["fp16"]["enabled"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, "'train_batch_size', which the run config owns.*global batch"),
        ({"gradient_clipping": 2.0}, "set optim.max_grad_norm instead"),
        ({"fp16": {"enabled": True}}, "'fp16', which the run config owns"),
        ({"bf16": {"enabled": True}}, "set precision instead"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer', which the run config owns"),
        ({"compile": {"deepcompile": True}}, "'compile'.* set training.compile instead"),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            "set training.activation_checkpointing instead",
        ),
        ({"zero_optimizatin": {"stage": 2}}, "unknown section.*did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "is 4; it must be 0, 1, 2 or 3"),
        ({"zero_optimization": 2}, "must be an object like .*, not 2"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}},
            "unknown key 'reduce_bucket_sise' in zero_optimization of .*'reduce_bucket_size'",
        ),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "data_types in .* must be an object like"),
        ({"data_types": {"param_dtype": "fp32"}}, "data_types in .* must be an object like"),
        ({"data_types": "fp32"}, "data_types in .* must be an object like"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "without ZeRO they are added up in fp32"),
        ({"zero_optimization": {"overlap_comm": "often"}}, "bad value 'often' for 'overlap_comm'"),
    ],
)
def test_contradictions_are_rejected(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_engine_json(path)


def test_missing_and_broken_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_engine_json(tmp_path / "none.json")
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_engine_json(path)
    path.write_text('{"zero_optimization": {"stage": 1, "stage": 3}}')
    with pytest.raises(ConfigError, match="key 'stage' occurs twice"):
        read_engine_json(path)


@pytest.mark.parametrize(
    ("engine_json", "precision", "expected"),
    [
        ({}, "bf16", ("fp32", "fp32")),
        ({"zero_optimization": {"stage": 1}}, "bf16", ("fp32", "fp32")),
        ({"zero_optimization": {"stage": 1}}, "fp16", ("fp16", "fp16")),
        ({"zero_optimization": {"stage": 3}}, "fp32", ("fp32", "fp32")),
        (
            {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}},
            "bf16", ("bf16", "fp32"),
        ),
        (
            {"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"},
            "bf16", ("fp32", "bf16"),
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "bf16", ("bf16", "fp32"),
        ),
    ],
)  # fmt: skip
def test_bf16_gradients_are_fp32_unless_the_json_says_otherwise(
    engine_json: dict[str, Any], precision: str, expected: tuple[str, str]
) -> None:
    assert gradient_format(engine_json, precision) == expected
    full = complete(engine_json, thinker_config(Path("data")), precision, False, 1)
    assert full["communication_data_type"] == expected[1]
    has_zero = bool(engine_json)
    assert full.get("data_types", {}).get("grad_accum_dtype") == (expected[0] if has_zero else None)


def test_the_throughput_timer_is_off_unless_the_json_turns_it_on() -> None:
    config = thinker_config(Path("data"))
    assert not complete({}, config, "fp32", False, 1)["timers"]["throughput"]["enabled"]
    wanted = {"timers": {"throughput": {"enabled": True}}}
    assert complete(wanted, config, "fp32", False, 1)["timers"] == wanted["timers"]
