"""A run does not reuse checkpoints of an earlier start, other data, or other exports."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muomni.checkpoint import file_list
from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.errors import CheckpointError, ConfigError
from muomni.run_folder import RunFolder
from muomni.training.session import Request, Session, finished_result, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


def _session(config: RunConfig, run: Path, resume: str = "auto") -> Session:
    engine_json = {"zero_optimization": {"stage": 1}}
    return prepare(Request(config, run, run, engine_json, resume), discover({}))


def test_starting_over_sets_the_earlier_state_aside(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    longer = thinker_config(text_data, {"training": {"max_steps": 4}})
    shorter = thinker_config(text_data, {"training": {"max_steps": 2}})
    one_rank.run(train, config=longer, run=tmp_path)
    one_rank.run(train, config=shorter, run=tmp_path, resume="never")
    checkpoints = tmp_path / "thinker" / "checkpoints"
    assert [folder.name for folder in checkpoints.glob("step_*")] == ["step_00000002"]
    (aside,) = (tmp_path / "thinker").glob("before-*")
    file_list.verify(aside / "checkpoints" / "step_00000004")
    assert (aside / "metrics.jsonl").read_text().count('"train"') == 4
    result = finished_result(_session(shorter, tmp_path))
    assert result is not None and result["step"] == 2
    assert finished_result(_session(longer, tmp_path)) is None


def test_a_finished_run_is_rejected_for_other_data_or_exports(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    one_rank.run(train, config=config, run=tmp_path)
    other = thinker_config(text_data, {"training": {"max_steps": 2}, "seed": 5})
    with pytest.raises(
        CheckpointError, match="written with other data, mix, tokenizer, batch sizes"
    ):
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


def _train_in_job(restarts: int, **arguments: Any) -> dict[str, Any]:
    """Train as a rank of Slurm job 7 that was requeued `restarts` times."""
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    before = {name: os.environ.get(name) for name in job}
    os.environ.update(job)
    try:
        return train(**arguments)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def test_a_requeued_job_continues_with_its_own_state(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 4, "save_every": 2}})
    one_rank.run(train, config=config, run=tmp_path)
    arguments = {"config": config, "run": tmp_path, "resume": "never"}
    one_rank.run(_train_in_job, restarts=0, **arguments)
    metrics = tmp_path / "thinker" / "metrics.jsonl"
    started = metrics.read_text().splitlines()[:2]
    shutil.rmtree(tmp_path / "thinker/checkpoints/step_00000004")  # as if killed after step 2
    one_rank.run(_train_in_job, restarts=1, **arguments)
    assert metrics.read_text().splitlines()[:2] == started
    assert len(list((tmp_path / "thinker").glob("before-*"))) == 1
    # A later job with the same command starts over again.
    time.sleep(1)
    one_rank.run(train, **arguments)
    assert len(list((tmp_path / "thinker").glob("before-*"))) == 2


def test_a_requeued_fork_continues_from_its_source_until_it_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path, "thinker")
    source = folder.checkpoints / "step_00000002"
    for step in (2, 4):
        (folder.checkpoints / f"step_{step:08d}").mkdir(parents=True)
    folder.metrics_file.write_text("")
    aside = folder.start_over("slurm 7", source)
    assert aside is not None and (aside / "checkpoints/step_00000004").is_dir()
    assert source.is_dir() and folder.metrics_file.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert folder.resume_now(str(source)) == str(source)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert folder.resume_now(str(source)) == "auto"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert folder.resume_now(str(source)) == str(source)


def test_fewer_steps_than_are_done_are_refused(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    longer = thinker_config(text_data, {"training": {"max_steps": 4}})
    one_rank.run(train, config=longer, run=tmp_path)
    shorter = thinker_config(text_data, {"training": {"max_steps": 2}})
    words = r"step_00000004 is of step 4, but this run has only 2 steps; increase --max-steps"
    with pytest.raises(CheckpointError, match=words):
        finished_result(_session(shorter, tmp_path))
    with pytest.raises(CheckpointError, match=words):
        one_rank.run(train, config=shorter, run=tmp_path)


def test_leftovers_of_killed_saves_are_removed(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    root = tmp_path / "thinker"
    for name in ("checkpoints/.step_00000009.tmp", ".export.4242.tmp"):
        (root / name).mkdir(parents=True)
    one_rank.run(
        train, config=thinker_config(text_data, {"training": {"max_steps": 2}}), run=tmp_path
    )
    assert not list(root.glob("**/.*.tmp"))
