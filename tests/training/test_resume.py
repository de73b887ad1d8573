"""A stopped and resumed run has the curve of an uninterrupted one."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.checkpoint import file_list
from muomni.config.names import ENGINES
from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.errors import CheckpointError, PreemptedError
from muomni.training.engine import deepspeed_quirks as quirks
from muomni.training.engine.ds_config import read_engine_json
from muomni.training.optim.schedule import lr_factor
from muomni.training.session import Request, open_loop, prepare
from muomni.training.stages.thinker import ThinkerTask
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


@pytest.mark.parametrize(
    ("zero", "precision"),
    [("zero0", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"), ("zero3", "fp32")],
)
def test_a_resumed_run_repeats_the_losses_bit_for_bit(
    zero: str, precision: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"precision": precision, "training": {"save_every": 8}})
    straight = two_ranks.run(train, config=config, run=tmp_path / "run", zero=zero)[0]
    checkpoints = tmp_path / "run" / "thinker" / "checkpoints"
    for newer in sorted(checkpoints.glob("step_*"))[1:]:
        shutil.rmtree(newer)  # as if the job had been killed after the save of this step
    shutil.rmtree(tmp_path / "run" / "thinker" / "export")
    resumed = two_ranks.run(train, config=config, run=tmp_path / "run", zero=zero)[0]
    assert [line["step"] for line in resumed["curve"]] == list(range(1, 21))
    assert resumed["losses"] == straight["losses"]
    assert resumed["val/loss"] == straight["val/loss"]


def test_tokens_between_the_last_log_and_a_save_are_counted(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(
        text_data, {"training": {"save_every": 8, "log_every": 5, "keep_last": 9}}
    )
    straight = two_ranks.run(train, config=config, run=tmp_path / "straight")[0]
    checkpoint = tmp_path / "straight" / "thinker" / "checkpoints" / "step_00000008"
    resumed = two_ranks.run(train, config=config, run=tmp_path / "on", resume=str(checkpoint))[0]
    seen = [(line["step"], line["tokens_seen"]) for line in straight["curve"]]
    assert [(line["step"], line["tokens_seen"]) for line in resumed["curve"]] == seen[1:]


def test_a_run_of_epochs_decays_at_its_end_after_a_resume(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    training = {"max_steps": None, "max_epochs": 1, "save_every": 8, "keep_last": 9}
    changes = {"training": training, "optim": {"schedule": "wsd", "decay_fraction": 0.5}}
    config = thinker_config(text_data, changes)
    straight = one_rank.run(train, config=config, run=tmp_path / "straight")[0]
    num_steps = straight["step"]
    expected = [3e-3 * lr_factor(step, num_steps, config.optim) for step in range(num_steps)]
    assert [line["lr"] for line in straight["curve"]] == expected
    assert expected[-1] == pytest.approx(3e-4)
    earlier = tmp_path / "straight" / "thinker" / "checkpoints" / "step_00000008"
    resumed = one_rank.run(train, config=config, run=tmp_path / "on", resume=str(earlier))[0]
    assert [line["lr"] for line in resumed["curve"]] == expected[8:]
    assert resumed["losses"] == straight["losses"][8:]


def test_fp16_resumes_with_its_loss_scale(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(
        text_data,
        {
            "precision": "fp16",
            "fp16": {"initial_scale_power": 6, "scale_window": 5},
            "training": {"save_every": 8, "max_steps": 12},
        },
    )
    straight = one_rank.run(train, config=config, run=tmp_path / "run")[0]
    shutil.rmtree(tmp_path / "run" / "thinker" / "checkpoints" / "step_00000012")
    resumed = one_rank.run(train, config=config, run=tmp_path / "run")[0]
    scales = [line["loss_scale"] for line in resumed["curve"]]
    assert scales == [line["loss_scale"] for line in straight["curve"]]
    assert scales[-1] > scales[0]
    assert resumed["losses"] == straight["losses"]


def _train_with_signal(config: Any, run: Path, at_step: int) -> str:
    """Only rank 1 gets the signal; returns the message of the loop."""
    rank = torch.distributed.get_rank()
    original, calls = ThinkerTask.forward, [0]

    def forward(self: ThinkerTask, batch: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == 2 * at_step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, batch)

    ThinkerTask.forward = forward  # type: ignore[method-assign]
    try:
        train(config, run)
    except PreemptedError as error:
        return str(error)
    finally:
        ThinkerTask.forward = original  # type: ignore[method-assign]
    return "not stopped"


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data)
    straight = two_ranks.run(train, config=config, run=tmp_path / "straight")[0]
    said = two_ranks.run(_train_with_signal, config=config, run=tmp_path / "run", at_step=5)
    assert "stopped by a signal to another rank after step 6" in said[0]
    assert "stopped by SIGUSR1 after step 6" in said[1]
    resumed = two_ranks.run(train, config=config, run=tmp_path / "run")[0]
    assert resumed["losses"] == straight["losses"]


def test_a_checkpoint_of_another_topology_or_data_is_rejected(
    text_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 4, "save_every": 2}})
    one_rank.run(train, config=config, run=tmp_path)
    with pytest.raises(CheckpointError, match=r"1 ranks, ZeRO 1.*2 ranks, ZeRO 1.*--resume never"):
        two_ranks.run(train, config=config, run=tmp_path)
    other = thinker_config(text_data, {"training": {"max_steps": 4}, "seed": 5})
    with pytest.raises(CheckpointError, match="other data, mix, tokenizer, batch sizes, or seed"):
        one_rank.run(train, config=other, run=tmp_path)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_a_checkpoint_of_another_size_is_rejected(
    zero: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    two_ranks.run(train, config=config, run=tmp_path, zero=zero)
    wider = {"training": {"max_steps": 4}, "model": {"intermediate_size": 96}}
    with pytest.raises(CheckpointError, match=r"a model of other sizes; use the preset.*never"):
        two_ranks.run(train, config=thinker_config(text_data, wider), run=tmp_path, zero=zero)


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero3"])
def test_a_checkpoint_of_other_parameter_groups_is_rejected(
    zero: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    changes = {"training": {"max_steps": 2}, "optim": {"lr_scales": {"*.mlp.*": 0.5}}}
    two_ranks.run(train, config=thinker_config(text_data, changes), run=tmp_path, zero=zero)
    for scales in (
        {},
        {"*.attention.*": 0.5},
        {"*.mlp.*": 2.0},
    ):  # the last one only changes their order
        other = {"training": {"max_steps": 4}, "optim": {"lr_scales": scales}}
        with pytest.raises(
            CheckpointError,
            match=r"other parameters than this run; use the optim\.lr_scales",
        ):
            two_ranks.run(train, config=thinker_config(text_data, other), run=tmp_path, zero=zero)
    same = {"training": {"max_steps": 4}, "optim": {"lr_scales": {"*.mlp.*": 0.25}}}
    two_ranks.run(train, config=thinker_config(text_data, same), run=tmp_path, zero=zero)


def test_a_checkpoint_without_its_groups_is_accepted(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    """Earlier versions wrote such checkpoints."""
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    one_rank.run(train, config=config, run=tmp_path)
    [listing] = tmp_path.glob("thinker/checkpoints/step_*/complete.json")
    content = json.loads(listing.read_text())
    del content["topology"]["parameter_groups"]
    listing.write_text(json.dumps(content))
    longer = thinker_config(text_data, {"training": {"max_steps": 4}})
    assert one_rank.run(train, config=longer, run=tmp_path)[0]["step"] == 4


def test_old_checkpoints_are_pruned_except_the_best_and_the_last(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    changes = {"training": {"save_every": 2, "validate_every": 3, "keep_last": 1, "max_steps": 10}}
    one_rank.run(train, config=thinker_config(text_data, changes), run=tmp_path)
    checkpoints = tmp_path / "thinker" / "checkpoints"
    best, latest = file_list.marked(checkpoints, "best"), file_list.marked(checkpoints, "latest")
    assert best is not None and latest is not None
    assert latest.name == "step_00000010"
    assert {folder.name for folder in checkpoints.glob("step_*")} == {best.name, latest.name}


def test_a_damaged_checkpoint_is_skipped_for_an_older_one(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"save_every": 2, "max_steps": 6}})
    one_rank.run(train, config=config, run=tmp_path)
    checkpoints = tmp_path / "thinker" / "checkpoints"
    newest = checkpoints / "step_00000006"
    weights = next(newest.rglob("*optim_states.pt"))
    weights.write_bytes(weights.read_bytes()[:-10])
    found = file_list.newest_complete(checkpoints)
    assert found is not None and found.name == "step_00000004"
    (found / "complete.json").unlink()  # a killed save leaves no file list
    assert file_list.newest_complete(checkpoints) is None


def test_a_damaged_checkpoint_is_replaced_when_its_step_runs_again(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"save_every": 2, "max_steps": 4}})
    one_rank.run(train, config=config, run=tmp_path)
    newest = tmp_path / "thinker" / "checkpoints" / "step_00000004"
    (newest / "complete.json").unlink()
    one_rank.run(train, config=config, run=tmp_path)
    file_list.verify(newest)


def test_resume_from_an_earlier_checkpoint_discards_later_ones(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    training = {"save_every": 2, "max_steps": 8, "keep_last": 4}
    config = thinker_config(text_data, {"training": training})
    one_rank.run(train, config=config, run=tmp_path)
    checkpoints = tmp_path / "thinker" / "checkpoints"
    first_course = file_list.verify(checkpoints / "step_00000006")
    other = thinker_config(text_data, {"training": {**training, "max_steps": 6, "keep_last": 1}})
    earlier = str(checkpoints / "step_00000004")
    one_rank.run(train, config=other, run=tmp_path, resume=earlier)
    assert [folder.name for folder in checkpoints.glob("step_*")] == ["step_00000006"]
    # A checkpoint of this step existed, but from the earlier run (with slower decay).
    assert file_list.verify(checkpoints / "step_00000006")["files"] != first_course["files"]


def _settings_after_resume(config: RunConfig, run: Path, zero: str) -> list[Any]:
    """Optimizer settings of a run that has resumed from the checkpoint of `run`."""
    engine_json = read_engine_json(ENGINES / f"{zero}.json")
    loop = open_loop(prepare(Request(config, run, run, engine_json, "auto"), discover()))
    try:
        optimizer = loop.engine.optimizer
        settings, scaler = quirks.optimizer_settings(optimizer)
        groups = [(g["weight_decay"], tuple(g["betas"]), g["eps"]) for g in optimizer.param_groups]
        return [loop.state.step, groups, settings, scaler]
    finally:
        loop.engine.deepspeed.destroy()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_optimizer_settings_are_those_of_the_run_and_not_of_the_checkpoint(
    zero: str, precision: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    def changed(**optim: Any) -> RunConfig:
        changes = {"training": {"max_steps": 2}, "precision": precision, "optim": optim}
        if optim:
            changes["training"] = {"max_steps": 4}
            changes["fp16"] = {"scale_window": 77, "min_scale": 4.0}
        return thinker_config(text_data, changes)

    two_ranks.run(train, config=changed(), run=tmp_path, zero=zero)
    config = changed(weight_decay=0.5, betas=(0.7, 0.8), eps=1e-3, max_grad_norm=0.25)
    step, groups, settings, scaler = two_ranks.run(
        _settings_after_resume, config=config, run=tmp_path, zero=zero
    )[0]
    assert step == 2
    assert groups == [(0.5, (0.7, 0.8), 1e-3), (0.0, (0.7, 0.8), 1e-3)]
    assert settings.get("clip_grad") in ((None, 0.0) if zero == "zero0" else (0.25,))
    if precision == "fp16":
        assert scaler["scale_window"] == 77
        assert scaler.get("min_scale", scaler.get("min_loss_scale")) == 4.0
    resumed = two_ranks.run(train, config=config, run=tmp_path, zero=zero)[0]
    assert resumed["step"] == 4
