"""Frozen parameters have no optimizer or ZeRO state, and a run prints what it trains."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks, discover
from muomni.training.planning.dry_run import describe, find_device
from muomni.training.session import Request, Session, open_loop, prepare
from muomni.training.stages.thinker import ThinkerStage, ThinkerTask
from tests.ranks import RankPool
from tests.training.runs import thinker_config

FROZEN = "stack.blocks.0."


def _frozen_session(config: RunConfig, run: Path, zero: int, ranks: Ranks) -> Session:
    """A session whose task has its first block frozen."""
    session = prepare(Request(config, run, run, {"zero_optimization": {"stage": zero}}), ranks)
    build = session.stage.build

    def build_frozen() -> ThinkerTask:
        task: Any = build()
        for name, parameter in task.thinker.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))
        return task

    session.stage.build = build_frozen  # type: ignore[method-assign]
    return session


def _open_and_step(config: RunConfig, run: Path, zero: int) -> dict[str, Any]:
    """The output of a start on this rank, and the sizes of all states after a step."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        loop = open_loop(_frozen_session(config, run, zero, discover()))
    engine, task = loop.engine, loop.engine.task
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in task.named_parameters()}
    frozen = {name for name in sizes if name.startswith(f"thinker.{FROZEN}")}
    before = engine.full_state("")
    loop.train_step()
    loop.train_step()
    after = engine.full_state("")
    basic = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = [p for group in basic.param_groups for p in group["params"]]
    if zero == 3:  # whose groups hold them during a step only
        masters = engine.optimizer.fp32_partitioned_groups_flat
    moments = [s["exp_avg"].numel() for s in basic.state.values() if "exp_avg" in s]
    result = {
        "said": said.getvalue(),
        "num_frozen": sum(sizes[name] for name in frozen),
        "num_trained": sum(sizes[name] for name in sizes.keys() - frozen),
        "num_moments": sum(moments),
        "num_master": sum(p.numel() for p in masters),
        "moved": {name for name in before if not torch.equal(before[name], after[name])},
        "trained": sizes.keys() - frozen,
    }
    engine.deepspeed.destroy()
    return result


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_frozen_parameters_have_no_state_and_stay(
    zero: int, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    found = two_ranks.run(_open_and_step, config=thinker_config(text_data), run=tmp_path, zero=zero)
    num_trained, num_frozen = found[0]["num_trained"], found[0]["num_frozen"]
    num_copies = 2 if zero == 0 else 1
    for key in ("num_moments", "num_master"):
        total = sum(rank[key] for rank in found)
        # ZeRO pads its partitions to equal sizes.
        assert num_copies * num_trained <= total < num_copies * num_trained + 200, key
    assert num_frozen > 2_000
    assert found[0]["moved"] == found[0]["trained"]
    assert f"freezes stack.*: {num_frozen:,} of" in found[0]["said"]
    assert "optimizes matrices of all parts: " in found[0]["said"]
    assert found[1]["said"] == ""


def test_a_dry_run_prints_what_would_be_trained(
    text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = _frozen_session(thinker_config(text_data), tmp_path, 0, discover({}))
    assert isinstance(session.stage, ThinkerStage)
    sizes = describe(session, find_device(session))
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("optimizes ") for line in said) == 2
    num_frozen = sizes["parameters"] - sizes["trainable_parameters"]
    assert any(line.startswith(f"freezes stack.*: {num_frozen:,} of ") for line in said)
    without_zero = sizes["memory"][0]
    assert without_zero["parts_bytes"]["gradients"] == 4 * sizes["trainable_parameters"]
    assert without_zero["optimizer_state_bytes"] == 8 * sizes["trainable_parameters"]
