"""Configs: precedence of the layers, and one-sentence errors with a suggestion."""

from pathlib import Path
from typing import Any

import pytest

from muomni.config.loading import parse_override, preset_names, resolve
from muomni.config.registry import STAGES
from muomni.config.stages import ThinkerRun
from muomni.errors import ConfigError


def test_command_line_wins_over_file_over_preset_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.5, weight_decay: 0.25}\n")
    config = resolve("thinker", "nano", file, parse_override("optim.lr=1e-3"))
    assert isinstance(config, ThinkerRun)
    assert config.optim.lr == 1e-3
    assert config.optim.weight_decay == 0.25
    assert config.batch.seq_len == 256  # the preset's, not the recipe's 512
    assert config.optim.max_grad_norm == 1.0  # the recipe's


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=3e-4", {"optim": {"lr": 3e-4}}),
        ("seed=7", {"seed": 7}),
        ("data.tokenizer=a b.model", {"data": {"tokenizer": "a b.model"}}),
        ("options.freeze=[a, b]", {"options": {"freeze": ["a", "b"]}}),
        ("training.max_epochs=null", {"training": {"max_epochs": None}}),
    ],
)
def test_override_values_are_yaml(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key 'optim.lrr'.*did you mean 'lr'.*keys here: "),
        ("optim.lr=fast", r"bad value 'fast' for 'optim.lr'.*number"),
        ("batch.seq_len=-3", r"bad value -3 for 'batch.seq_len'"),
        ("precison=fp32", r"unknown key 'precison'.*did you mean 'precision'"),
        ("precision=fp8", r"bad value 'fp8' for 'precision'"),
        ("training.max_epochs=2", r"exactly one of training.max_steps and training.max_epochs"),
    ],
)
def test_errors_name_the_key_and_a_suggestion(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("thinker", "nano", None, parse_override(override))


@pytest.mark.parametrize("text", ["lr", "=3", "a..b=1", "--lr=3"])
def test_invalid_overrides_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="not an override"):
        parse_override(text)


def test_unknown_stage_preset_and_file_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown stage 'thinkr'.*did you mean 'thinker'"):
        resolve("thinkr", "nano")
    with pytest.raises(ConfigError, match=r"unknown preset 'nanoo'.*did you mean 'nano'"):
        resolve("thinker", "nanoo")
    with pytest.raises(ConfigError, match="does not exist"):
        resolve("thinker", "nano", tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("optim: {lr: 1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        resolve("thinker", "nano", broken)
    broken.write_text("stage: codec\n")
    with pytest.raises(ConfigError, match="is for stage 'codec'"):
        resolve("thinker", "nano", broken)


def test_duplicate_keys_in_a_file_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("optim:\n  lr: 1.0\n  weight_decay: 0\n  lr: 2.0\n")
    with pytest.raises(ConfigError, match=r"twice.yaml is not valid YAML \(key 'lr' occurs twice"):
        resolve("thinker", "nano", file)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_resolves_for_every_stage(preset: str) -> None:
    for stage in STAGES:
        assert resolve(stage, preset).stage == stage


@pytest.mark.parametrize("text", ["false", "none", "full", "2", "{thinker: full, 'vision*': 3}"])
def test_activation_checkpointing_policies(text: str) -> None:
    override = parse_override(f"training.activation_checkpointing={text}")
    policy = override["training"]["activation_checkpointing"]
    assert resolve("sft", "nano", None, override).training.activation_checkpointing == policy


@pytest.mark.parametrize("text", ["half", "-1", "{thinker: half}"])
def test_invalid_policies_are_rejected(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"activation_checkpointing.* is not a policy; use none, full"
    ):
        resolve("sft", "nano", None, parse_override(f"training.activation_checkpointing={text}"))


def test_a_section_without_keys_says_so() -> None:
    with pytest.raises(ConfigError, match=r"'options\.speed' .*; keys here: none$"):
        resolve("talker", "nano", None, parse_override("options.speed=1"))


@pytest.mark.parametrize("value", [-1, "many", 2.5, True])
def test_the_number_of_workers_is_a_number_or_auto(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"'data.num_workers' .*a number of processes, at most 1024, or auto"
    ):
        resolve("thinker", "nano", None, {"data": {"num_workers": value}})
