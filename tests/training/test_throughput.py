"""Metrics and traces of short runs, requested by config and by touching a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.errors import ConfigError
from muomni.observe.profiler import MEMORY_REQUEST, TRACE_REQUEST
from muomni.training.loop import Loop, StepResult
from muomni.training.session import Request, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train

SECTIONS = {"data_wait", "forward", "backward", "communication", "optimizer", "logging"}


def short(data: Path, **changes: Any) -> RunConfig:
    content = {"training": {"max_steps": 6, **changes.pop("training", {})}, **changes}
    return thinker_config(data, content)


def ranges(path: Path) -> dict[str, int]:
    """How often each section of the step occurs in a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in SECTIONS if name in names}


def test_metrics_of_the_same_steps_do_not_depend_on_the_ranks(
    text_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    config = short(text_data, training={"peak_tflops": 0.1})
    results = [
        pool.run(train, config=config, run=tmp_path / str(pool.num_ranks))[0]
        for pool in (one_rank, two_ranks)
    ]
    per_step = []
    for num_ranks, result in zip((1, 2), results, strict=True):
        for line in result["curve"]:
            assert 0 < line["mfu"] < line["hfu"]
            assert line["mfu"] == pytest.approx(line["model_tflop_per_s"] / 0.1)
            assert SECTIONS - {"logging"} <= named(line)
            assert sum(v for k, v in line.items() if k.endswith("_percent")) == pytest.approx(100)
        assert "logging" in named(result["curve"][-1])
        assert 0 < result["mfu"] < result["hfu"]
        per_step.append(
            [
                line["model_tflop_per_s"] * line["step_time_s"] * num_ranks
                for line in result["curve"]
            ]
        )
    assert per_step[0] == pytest.approx(per_step[1])


def named(line: dict[str, Any]) -> set[str]:
    return {key[5:-2] for key in line if key.startswith("time/") and key.endswith("_s")}


def test_named_ranks_trace_the_configured_steps(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    profile = {"start_step": 3, "num_steps": 2, "ranks": [1]}
    two_ranks.run(train, config=short(text_data, profile=profile), run=tmp_path)
    (trace,) = (tmp_path / "thinker" / "profile").iterdir()
    assert trace.name == "trace_steps_00000003-00000004_rank1.json"
    found = ranges(trace)
    # Two micro-batches per rank and step.
    assert found["backward"] >= 4 and found["forward"] >= 4 and found["optimizer"] >= 4
    assert found["data_wait"] >= 2
    # The denominators before each backward pass, and the gradients at its end.
    assert found["communication"] >= 8


def touch_and_train(config: RunConfig, run: Path, names: list[str]) -> dict[str, Any]:
    """Train, and touch files in the run folder when the first step is logged."""
    log = Loop.log

    def touching(loop: Loop) -> None:
        if loop.state.step == 1 and loop.is_main:
            for name in names:
                (loop.parts.folder.root / name).touch()
        log(loop)

    Loop.log = touching  # type: ignore[method-assign]
    try:
        return train(config, run)
    finally:
        Loop.log = log  # type: ignore[method-assign]


def test_touching_a_file_traces_the_next_steps_of_all_named_ranks(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = short(text_data, profile={"num_steps": 2, "ranks": [0, 1]})
    two_ranks.run(touch_and_train, config=config, run=tmp_path, names=[TRACE_REQUEST])
    root = tmp_path / "thinker"
    assert not (root / TRACE_REQUEST).exists()
    names = sorted(path.name for path in (root / "profile").iterdir())
    assert names == [f"trace_steps_00000002-00000003_rank{rank}.json" for rank in (0, 1)]
    assert all(ranges(root / "profile" / name)["optimizer"] >= 4 for name in names)


def test_a_request_waits_for_the_end_of_the_configured_steps(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = short(text_data, profile={"start_step": 1, "num_steps": 2})
    one_rank.run(touch_and_train, config=config, run=tmp_path, names=[TRACE_REQUEST])
    names = sorted(path.name for path in (tmp_path / "thinker" / "profile").iterdir())
    assert names == [
        "trace_steps_00000001-00000002_rank0.json", "trace_steps_00000004-00000005_rank0.json",
    ]  # fmt: skip


def test_configured_steps_are_traced_after_a_request(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = short(text_data, profile={"start_step": 6, "num_steps": 1})
    one_rank.run(touch_and_train, config=config, run=tmp_path, names=[TRACE_REQUEST])
    recorded = sorted(path.stem[-14:-6] for path in (tmp_path / "thinker" / "profile").iterdir())
    assert len(recorded) == 2
    assert recorded[1] == "00000006"


def test_a_run_on_a_cpu_ignores_a_request_for_a_memory_snapshot(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = short(text_data)
    result = one_rank.run(touch_and_train, config=config, run=tmp_path, names=[MEMORY_REQUEST])[0]
    assert result["step"] == 6
    assert not (tmp_path / "thinker" / MEMORY_REQUEST).exists()
    assert not (tmp_path / "thinker" / "profile").exists()


def stop_while_recording(config: RunConfig, run: Path) -> list[str]:
    """Train until an error during the trace; returns what is left of it."""
    train_step = Loop.train_step

    def failing(loop: Loop, wants_stop: bool = False) -> StepResult:
        if loop.state.step == 3:
            raise RuntimeError("stop")
        return train_step(loop, wants_stop)

    Loop.train_step = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="stop"):
            train(config, run)
    finally:
        Loop.train_step = train_step  # type: ignore[method-assign]
    return [str(path) for path in run.rglob("*trace*")]


def test_traces_are_complete_or_absent(text_data: Path, tmp_path: Path, one_rank: RankPool) -> None:
    config = short(text_data, profile={"start_step": 3, "num_steps": 3})
    assert one_rank.run(stop_while_recording, config=config, run=tmp_path / "a") == [[]]
    # A run that ends during the trace writes the steps until then.
    config = short(text_data, profile={"start_step": 5, "num_steps": 9})
    one_rank.run(train, config=config, run=tmp_path / "b")
    (trace,) = (tmp_path / "b" / "thinker" / "profile").iterdir()
    assert trace.name == "trace_steps_00000005-00000006_rank0.json"
    assert ranges(trace)["backward"] >= 8


def test_a_missing_rank_is_rejected_before_any_start(text_data: Path, tmp_path: Path) -> None:
    config = short(text_data, profile={"start_step": 1, "ranks": [0, 7]})
    request = Request(config, tmp_path, tmp_path, {"zero_optimization": {"stage": 0}}, "never")
    with pytest.raises(ConfigError, match=r"profile\.ranks names rank 7, but there is 1 rank"):
        prepare(request, discover({}))
