"""A run does not reuse checkpoints of an earlier start, other data, or other exports."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.errors import CheckpointError, ConfigError
from muomni.training.session import Request, Session, finished_result, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


def _session(config: RunConfig, run: Path, resume: str = "auto") -> Session:
    engine_json = {"zero_optimization": {"stage": 1}}
    return prepare(Request(config, run, run, engine_json, resume), discover({}))


def test_starting_over_deletes_later_checkpoints(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    longer = thinker_config(text_data, {"training": {"max_steps": 4}})
    shorter = thinker_config(text_data, {"training": {"max_steps": 2}})
    one_rank.run(train, config=longer, run=tmp_path)
    one_rank.run(train, config=shorter, run=tmp_path, resume="never")
    checkpoints = tmp_path / "thinker" / "checkpoints"
    assert [folder.name for folder in checkpoints.glob("step_*")] == ["step_00000002"]
    result = finished_result(_session(shorter, tmp_path))
    assert result is not None and result["step"] == 2
    assert finished_result(_session(longer, tmp_path)) is None


def test_a_finished_run_is_rejected_for_other_data_or_exports(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    one_rank.run(train, config=config, run=tmp_path)
    other = thinker_config(text_data, {"training": {"max_steps": 2}, "seed": 5})
    with pytest.raises(CheckpointError, match="written with other data, tokenizer, batch sizes"):
        finished_result(_session(other, tmp_path))
    session = _session(config, tmp_path)
    session.stage.context.upstream = {"codec": SimpleNamespace(digest="new")}  # type: ignore[dict-item]
    assert finished_result(session) is not None  # it began before digests were saved
    config_file = tmp_path / "thinker" / "config.yaml"
    text = config_file.read_text()
    config_file.write_text(
        text.replace("  upstream_digests: {}", "  upstream_digests: {codec: old}")
    )
    with pytest.raises(CheckpointError, match=r"codec was retrained after .*--resume never"):
        finished_result(session)


def test_sizes_and_the_checkpoint_to_resume_are_checked_before_anything_is_written(
    text_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown key 'model.hiden_size'.*did you mean 'hidden_size'"
    ):
        _session(thinker_config(text_data, {"model": {"hiden_size": 8}}), tmp_path)
    with pytest.raises(CheckpointError, match=r"--resume .*none is not a checkpoint folder"):
        _session(thinker_config(text_data), tmp_path, str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"checkpoint .* is incomplete"):
        _session(thinker_config(text_data), tmp_path, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_rejected_for_other_sizes(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    one_rank.run(train, config=config, run=tmp_path)
    wider = thinker_config(
        text_data, {"training": {"max_steps": 2}, "model": {"intermediate_size": 96}}
    )
    with pytest.raises(CheckpointError, match=r"finished with intermediate_size=64 \(not 96\)"):
        finished_result(_session(wider, tmp_path))
