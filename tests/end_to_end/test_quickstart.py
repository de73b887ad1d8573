"""From the bundled corpora to a spoken answer, with the real commands on two ranks.

The tests build on each other: shard, train every stage for a few steps, resume one, evaluate, generate.
The models learn almost nothing here; `make quickstart` shows that they do learn.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile

from muomni.distributed.discovery import free_port
from muomni.observe.metrics_log import read_lines
from tests.ranks import RankPool

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("thinker", "audio_encoder", "vision_encoder", "codec", "talker", "sft")
STEPS = 4
QUICK = ("training.log_every=1", "training.save_every=2", "training.validate_samples=8")


def command(*arguments: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository root, as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def train(stage: str, data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return command(
        "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py",
        "--stage", stage, "--data", data, "--run", run, "--max-steps", str(STEPS), *QUICK, *more,
    )  # fmt: skip


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object that a command prints last (the launcher may append lines)."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.fixture(scope="module", autouse=True)
def stop_idle_ranks(one_rank: RankPool, two_ranks: RankPool) -> None:
    """Free memory: the commands here start their own ranks."""
    one_rank.close()
    two_ranks.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    done = command(sys.executable, "-m", "data_prep", "sample", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart_runs") / "run"


def test_sft_on_a_fresh_clone_names_the_missing_exports(data: Path, run: Path) -> None:
    done = command(
        sys.executable, "launch/train.py", "--stage", "sft", "--data", data, "--run", run
    )
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    for stage in STAGES[:-1]:
        assert f"--stage {stage}" in done.stderr
    assert "make quickstart" in done.stderr
    assert not run.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_and_exports(stage: str, data: Path, run: Path) -> None:
    result = result_of(train(stage, data, run))
    assert result["stage"] == stage and result["step"] == STEPS
    folder = run / stage
    assert (folder / "export" / "model.safetensors").is_file()
    assert (folder / "config.yaml").is_file()
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert all(line["loss"] is not None for line in lines if line["kind"] == "train")
    assert any(line["kind"] == "val" for line in lines)


def test_mlflow_has_one_run_per_stage_with_metrics_and_samples(run: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(run.name)
    assert experiment is not None
    runs = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {run.name, *STAGES}
    for stage in STAGES:
        found = runs[stage]
        assert found.info.status == "FINISHED"
        assert found.data.tags["mlflow.parentRunId"] == runs[run.name].info.run_id
        history = client.get_metric_history(found.info.run_id, "loss/train")
        assert [point.step for point in history] == list(range(1, STEPS + 1))
        assert found.data.params["stage"] == stage
        files = run.parent / "mlartifacts" / run.name / found.info.run_id / "artifacts"
        assert (files / "config" / "config.yaml").is_file()
        assert (files / "samples").is_dir()


def test_finished_stage_is_reported_and_a_lost_checkpoint_is_retrained(
    data: Path, run: Path
) -> None:
    again = train("thinker", data, run)
    assert "is finished" in again.stdout
    before = read_lines(run / "thinker" / "metrics.jsonl")
    shutil.rmtree(run / "thinker" / "checkpoints" / f"step_{STEPS:08d}")
    shutil.rmtree(run / "thinker" / "export")
    resumed = train("thinker", data, run)
    assert f"2/{STEPS} steps" in resumed.stdout
    assert result_of(resumed)["step"] == STEPS
    after = read_lines(run / "thinker" / "metrics.jsonl")

    def losses(lines: list[dict[str, Any]]) -> list[float]:
        return [line["loss"] for line in lines if line["kind"] == "train"]

    assert losses(after) == losses(before)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_evaluated_on_held_out_data(stage: str, data: Path, run: Path) -> None:
    done = command(
        sys.executable, "launch/evaluate.py", "--stage", stage, "--data", data, "--run", run,
        "--limit", "8",
    )  # fmt: skip
    result = result_of(done)
    assert result["stage"] == stage


def test_fine_tuned_model_answers_in_text_and_speech(data: Path, run: Path, tmp_path: Path) -> None:
    image = next((data / "corpora" / "images" / "val2017").glob("*.png"))
    audio = next((data / "corpora" / "speech" / "clips").glob("*.ogg"))
    speech = tmp_path / "answer.wav"
    done = command(
        sys.executable, "launch/generate.py", "--run", run, "--text", "What is this?",
        "--image", image, "--audio", audio, "--speak", speech, "--max-new-tokens", "8",
        "--min-new-tokens", "4",
    )  # fmt: skip
    assert isinstance(result_of(done)["text"], str)
    assert soundfile.info(speech).samplerate == 16_000
