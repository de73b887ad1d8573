"""Parallel stages: dependencies, order, and ranks. Training is simulated."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muomni.cli.pipeline import add_options
from muomni.command_line import CommandParser
from muomni.config.registry import STAGES
from muomni.pipeline import local, runner
from muomni.pipeline.graph import next_stage, stage_needs, trains_alone
from muomni.pipeline.runner import Pipeline
from tests.pipeline.fake_stages import (
    HANDLER,
    RANK,
    config_of,
    launcher_of,
    run_main,
    use_fake_stages,
)

# Waits for files, then writes the files of a finished stage.
FAKE_STAGE = """
import sys, time
from pathlib import Path
run, stage, wanted = Path({run!r}), {stage!r}, {wanted!r}
(run / f"{{stage}}.started").touch()
deadline = time.monotonic() + 20
while not all((run / name).exists() for name in wanted):
    time.sleep(0.05)
    if time.monotonic() > deadline:
        raise SystemExit(4)
export = run / stage / "export"
export.mkdir(parents=True)
(export / "export.json").write_text('{{"step": 7}}')
(export / "metrics.json").write_text("{{}}")
(run / f"{{stage}}.ended").touch()
"""


def test_the_graph_matches_the_registry() -> None:
    needs = stage_needs()
    assert needs["talker"] == {"codec"} and needs["sft"] == set(STAGES) - {"sft"}
    assert [stage for stage in STAGES if trains_alone(stage, needs)] == ["sft"]


@given(st.lists(st.sampled_from(list(STAGES)), unique=True), st.randoms(use_true_random=False))
def test_each_stage_trains_once_after_its_dependencies_in_any_order_of_ends(
    chosen: list[str], random: object
) -> None:
    needs, waiting = stage_needs(), list(chosen)
    running: list[str] = []
    finished: list[str] = []
    while waiting or running:
        while len(running) < 2 and (stage := next_stage(waiting, running, needs)):
            assert not (needs[stage] & set(chosen)) - set(finished)
            waiting.remove(stage)
            running.append(stage)
        assert running
        finished.append(running.pop(random.randrange(len(running))))  # type: ignore[attr-defined]
    assert sorted(finished) == sorted(chosen)


def test_stages_with_most_dependents_start_first() -> None:
    needs = stage_needs()
    assert next_stage(["thinker", "codec", "talker", "sft"], [], needs) == "codec"
    assert next_stage(["talker", "sft"], ["codec"], needs) is None


def test_independent_stages_train_at_the_same_time_and_others_wait(
    text_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # codec and thinker wait for each other to start, talker for codec to end.
    wanted = {
        "codec": ["thinker.started"],
        "thinker": ["codec.started", "talker.started"],
        "talker": ["codec.ended"],
    }
    programs = {
        stage: FAKE_STAGE.format(run=str(tmp_path), stage=stage, wanted=names)
        for stage, names in wanted.items()
    }
    use_fake_stages(monkeypatch, programs)
    common = ("--data", str(text_data), "--run", str(tmp_path), "--stages", "thinker,codec,talker")
    assert run_main(*common, "--ranks", "2", "--parallel-stages", "2") == 0
    printed = capfd.readouterr().out
    starts = [line.split()[1] for line in printed.splitlines() if line.startswith("== ")]
    assert starts == ["codec:", "thinker:", "talker:"]
    assert "== codec: 1 rank, " in printed
    table = [line.split()[0] for line in printed.splitlines()[-5:-2]]
    assert table == ["thinker", "codec", "talker"]


def test_after_a_failure_the_others_save_and_nothing_starts(
    text_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    failing = FAKE_STAGE.format(run=str(tmp_path), stage="codec", wanted=["up"])
    failing = failing.replace("export = run", "raise SystemExit(3)\nexport = run")
    up = f"open({str(tmp_path / 'up')!r}, 'w').close(); "
    rank = RANK.format(handler=HANDLER + up)
    use_fake_stages(monkeypatch, {"codec": failing, "thinker": launcher_of(rank)})
    common = (
        "--data",
        str(text_data),
        "--run",
        str(tmp_path),
        "--ranks",
        "2",
        "--parallel-stages",
        "2",
    )
    assert run_main(*common, "--stages", "thinker,codec,talker") == 3
    captured = capfd.readouterr()
    assert "[thinker] up" in captured.out
    assert "thinker: its ranks save and stop" in captured.out
    assert "pipeline: stage codec failed with exit code 3" in captured.err
    assert not (tmp_path / "talker").exists()


def pipeline_of(data: Path, *arguments: str) -> Pipeline:
    parser = CommandParser("pipeline")
    add_options(parser)
    return Pipeline(parser.parse_args(["--data", str(data), "--run", "run", *arguments]), [])


def test_parallel_stages_share_ranks_and_the_last_stage_has_all(text_data: Path) -> None:
    both = pipeline_of(text_data, "--ranks", "8", "--parallel-stages", "2")
    shares = {stage: both.ranks_of(stage, config_of(stage, text_data)) for stage in STAGES}
    assert set(shares.values()) == {4, 8} and shares["sft"] == 8
    assert pipeline_of(text_data, "--ranks", "1", "--parallel-stages", "3").num_slots == 1
    assert (
        pipeline_of(text_data, "--ranks", "8").ranks_of("codec", config_of("codec", text_data)) == 8
    )


def test_ranks_are_limited_by_the_global_batch(
    text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "count_ranks", lambda: 70)
    config = config_of("codec", text_data)
    assert config.batch.max_ranks == 16
    assert pipeline_of(text_data).ranks_of("codec", config) == 16


def test_parallel_stages_use_different_visible_gpus(
    text_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local, "num_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    look = FAKE_STAGE.replace("import sys", "import os, sys")
    look += "print(stage, os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['MUOMNI_GPUS'])"
    wanted = {"codec": ["thinker.started"], "thinker": ["codec.started"]}
    programs = {
        stage: look.format(run=str(tmp_path), stage=stage, wanted=names)
        for stage, names in wanted.items()
    }
    use_fake_stages(monkeypatch, programs)
    common = ("--data", str(text_data), "--run", str(tmp_path), "--stages", "thinker,codec")
    assert run_main(*common, "--ranks", "4", "--parallel-stages", "2") == 0
    printed = capfd.readouterr().out
    assert "[thinker] thinker None GPU-a,GPU-b\n" in printed
    assert "[codec] codec None GPU-c,GPU-d\n" in printed


@pytest.mark.parametrize("option", ["--ranks", "--parallel-stages"])
def test_zero_is_rejected(
    text_data: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_main("--data", str(text_data), "--run", "run", option, "0") == 2
    assert f"{option}: '0' is not an integer from 1" in capfd.readouterr().err
