"""The sharding array and the job chain of all stages on a real Slurm cluster of two nodes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from muomni.config.registry import STAGES
from tests.corpora import sentences
from tests.slurm.testbed import ROOT, Cluster, Job, open_cluster

pytestmark = pytest.mark.slurm

SHORT = (
    "training.max_steps=2", "training.max_epochs=null", "training.validate_samples=8",
    "training.log_every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as opened:
        yield opened


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 400 lines."""
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_text("\n".join(sentences(400, seed=3)) + "\n")
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled corpora, sharded."""
    root = tmp_path_factory.mktemp("sample") / "data"
    data_prep("sample", "--out", str(root), "--workers", "1")
    return root


def data_prep(*arguments: str) -> None:
    command = [sys.executable, "-m", "data_prep", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=600)


def sharding(corpus: Path, out: Path) -> list[str]:
    fixed = ["--name", "lines", "--shard-size", "25", "--val-fraction", "0.1"]
    return ["text", "--format", "txt", "--src", str(corpus), "--out", str(out), *fixed]


def shard_bytes(dataset: Path) -> dict[str, bytes]:
    """Contents of all shards and indexes of a dataset, keyed by relative path."""
    files = [path for path in dataset.rglob("*") if path.suffix in (".tar", ".idx", ".npy")]
    return {str(path.relative_to(dataset)): path.read_bytes() for path in sorted(files)}


def test_array_tasks_write_the_same_shards_as_one_process(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    data_prep(*sharding(corpus, tmp_path / "alone"))
    log = f"--output={tmp_path}/%A_%a.log"
    array = ["--array=0-2", "--cpus-per-task=1", log]
    job = cluster.submit(array, "shard_array.sbatch", *sharding(corpus, tmp_path / "array"))
    assert job.wait(300) == ["COMPLETED"] * 3
    expected = shard_bytes(tmp_path / "alone")
    assert len(expected) > 30 and shard_bytes(tmp_path / "array") == expected
    manifests = [tmp_path / name / "manifest.json" for name in ("alone", "array")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()
    logs = sorted(tmp_path.glob("*_*.log"))
    assert [f"task {i} of 3" in path.read_text() for i, path in enumerate(logs)] == [True] * 3

    # Rerun one task after its shards were deleted.
    lost = sorted((tmp_path / "array" / "train").glob("*.tar"))[1]
    lost.with_suffix(".json").unlink()
    lost.unlink()
    again = ["--array=1", "--cpus-per-task=1", log]
    job = cluster.submit(again, "shard_array.sbatch", *sharding(corpus, tmp_path / "array"))
    assert job.wait(300) == ["FAILED"]  # one task would shard the corpus into a single part
    assert "MUOMNI_ARRAY_TASKS" in job.log
    job = cluster.submit(
        again, "shard_array.sbatch", *sharding(corpus, tmp_path / "array"), MUOMNI_ARRAY_TASKS="3"
    )
    assert job.wait(300) == ["COMPLETED"], job.tail()
    assert shard_bytes(tmp_path / "array") == expected


def submit_chain(cluster: Cluster, *arguments: str) -> dict[str, Job]:
    """Run slurm/pipeline.sh; returns its jobs, keyed by name."""
    printed = cluster.call(str(ROOT / "slurm" / "pipeline.sh"), *arguments)
    lines = [line.split() for line in printed.splitlines()]
    return {line[0]: Job(cluster, line[1]) for line in lines if len(line) == 2}


def exported_step(run: Path, stage: str) -> int:
    return json.loads((run / stage / "export" / "export.json").read_text())["step"]


def test_chain_from_a_text_file_to_an_evaluated_thinker(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    jobs = submit_chain(
        cluster, "--data", str(data), "--run", str(run), "--stages", "thinker",
        "--shards", " ".join(sharding(corpus, data / "lines")) + " --test-fraction 0.1",
        "--array", "0-1", "--sbatch-shards", "--cpus-per-task=1", "--vocab-size", "320",
        "--sbatch", "--nodes=2", "--", *SHORT,
    )  # fmt: skip
    assert list(jobs) == ["shards0", "tokenizer", "thinker", "evaluate-thinker"]
    last = jobs["evaluate-thinker"]
    assert last.wait(600) == ["COMPLETED"], last.tail()
    assert exported_step(run, "thinker") == 2
    assert "2 ranks x 1 micro-batch" in jobs["thinker"].log
    report = json.loads((run / "thinker" / "evaluation.json").read_text())
    assert report["stage"] == "thinker" and report["metrics"]["perplexity"] > 1


def test_stages_use_upstream_exports(cluster: Cluster, sample: Path, tmp_path: Path) -> None:
    arguments = ("--data", str(sample), "--run", str(tmp_path), "--sbatch", "--nodes=2")
    jobs = submit_chain(cluster, *arguments, "--no-evaluate", "--", *SHORT)
    assert set(jobs) == set(STAGES)
    waits = jobs["sft"].field("Dependency")
    assert all(f"afterok:{jobs[stage].id}(" in waits for stage in STAGES if stage != "sft")
    assert jobs["sft"].wait(1800) == ["COMPLETED"], jobs["sft"].tail()
    for stage in STAGES:
        assert jobs[stage].states() == ["COMPLETED"]
        assert exported_step(tmp_path, stage) == 2, jobs[stage].tail()
    talker = json.loads((tmp_path / "talker" / "export" / "export.json").read_text())
    codec = json.loads((tmp_path / "codec" / "export" / "export.json").read_text())
    assert talker["upstream"]["codec"] == codec["sha256"]["model.safetensors"]


def test_failed_stage_cancels_only_its_downstream_stages(
    cluster: Cluster, sample: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for name in ("text", "tokenizer.model"):  # enough for thinker, not for codec
        (data / name).symlink_to(sample / name)
    arguments = ("--data", str(data), "--run", str(run), "--stages", "thinker,codec,talker")
    jobs = submit_chain(cluster, *arguments, "--no-evaluate", "--", *SHORT)
    assert jobs["codec"].wait(300) == ["FAILED"]
    assert jobs["codec"].field("ExitCode") == "3:0"
    assert jobs["codec"].log.count("has no complete dataset of task 'speech'") == 1
    assert jobs["talker"].wait(60) == ["CANCELLED"]
    assert jobs["thinker"].wait(600) == ["COMPLETED"], jobs["thinker"].tail()
    assert not (run / "talker" / "config.yaml").exists()
