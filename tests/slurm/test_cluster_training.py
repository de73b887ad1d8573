"""slurm/train.sbatch on a real Slurm cluster of two nodes: ranks, stops, requeues, and resumed curves."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muomni.distributed.discovery import first_host
from muomni.observe.metrics_log import read_lines
from tests.corpora import write_text_dataset, write_tokenizer
from tests.slurm.testbed import ROOT, Cluster, Job, open_cluster
from tests.training.runs import TINY_THINKER

pytestmark = pytest.mark.slurm

NUM_STEPS = 300
START_TIMEOUT_S, RUN_TIMEOUT_S = 240, 600
TINY = [
    *(f"model.{name}={value}" for name, value in TINY_THINKER.items()),
    "batch.seq_len=64", "batch.global_tokens=256", "batch.micro_sequences=1", "training.log_every=1",
    "training.validate_every=100000",
    "training.save_every=100000", "training.validate_samples=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as opened:
        yield opened


class Training:
    """Thinker runs on two nodes with one rank each, all in one folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        write_text_dataset(folder / "data" / "text")
        write_tokenizer(folder / "data" / "tokenizer.model")

    def submit(
        self, name: str, *options: str, slow_step_s: float = 0.0, num_steps: int = NUM_STEPS
    ) -> Job:
        program = [str(ROOT / "tests" / "slurm" / "slow_train.py")] if slow_step_s else []
        return self.cluster.submit(
            ["--nodes=2", f"--output={self.folder}/{name}-%j.log", *options],
            "train.sbatch", *program, "--stage", "thinker", "--data", f"{self.folder}/data",
            "--run", f"{self.folder}/{name}", "--max-steps", str(num_steps), *TINY,
            SLOW_STEP_S=str(slow_step_s), MUOMNI_STOP_BEFORE_S="30",
        )  # fmt: skip

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, loss) of each logged step."""
        path = self.folder / name / "thinker" / "metrics.jsonl"
        lines = read_lines(path) if path.exists() else []
        return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]

    def wait_for_steps(self, name: str, job: Job, num_steps: int = 3) -> None:
        wait_until(lambda: len(self.curve(name)) >= num_steps, job)

    def exported_step(self, name: str) -> int:
        export = self.folder / name / "thinker" / "export" / "export.json"
        return json.loads(export.read_text())["step"]


def wait_until(condition: Callable[[], bool], job: Job, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timeout after {timeout_s} s: {job.tail()}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def training(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def uninterrupted(training: Training) -> list[tuple[int, float]]:
    """The curve of an uninterrupted run, whose job is checked in detail."""
    job = training.submit("uninterrupted")
    assert job.wait(RUN_TIMEOUT_S) == ["COMPLETED"], job.tail()
    assert (job.field("ExitCode"), job.field("Restarts")) == ("0:0", "0")
    assert job.field("NumNodes") == "2"
    assert f"thinker from the start: 0/{NUM_STEPS} steps\n" in job.log
    assert " 4 sequences per step on 2 ranks x 2 micro-batches\n" in job.log
    assert json.loads(job.log.splitlines()[-1])["step"] == NUM_STEPS
    curve = training.curve("uninterrupted")
    assert [step for step, _ in curve] == list(range(1, NUM_STEPS + 1))
    assert training.exported_step("uninterrupted") == NUM_STEPS
    return curve


def test_signal_saves_and_requeues_and_the_curve_continues(
    training: Training, uninterrupted: list[tuple[int, float]]
) -> None:
    job = training.submit("signal")
    training.wait_for_steps("signal", job)
    training.cluster.call("scancel", "--batch", "--signal=USR1", job.id)
    assert job.wait(RUN_TIMEOUT_S) == ["COMPLETED"], job.tail()
    assert job.field("Restarts") == "1"
    assert "requeue 1 of at most 20: the run was stopped and its state is saved" in job.log
    assert "thinker resumed from" in job.log
    assert training.curve("signal") == uninterrupted  # bitwise, and each step once


def test_signal_to_starting_ranks_is_not_lost(training: Training) -> None:
    # Longer than the five seconds between two signals, so the run cannot end before the second.
    job = training.submit("early", slow_step_s=0.1, num_steps=100)
    wait_until(lambda: "train.sbatch: job" in job.log, job)
    training.cluster.call("scancel", "--batch", "--signal=USR1", job.id)
    assert job.wait(RUN_TIMEOUT_S) == ["COMPLETED"], job.tail()
    assert job.field("Restarts") == "1"
    assert [step for step, _ in training.curve("early")] == list(range(1, 101))


def test_run_survives_the_time_limit(training: Training) -> None:
    """At least one minute of steps in two-minute jobs that are signaled one minute before their end."""
    options = ("--time=2", "--signal=B:USR1@60")  # train.sbatch itself would stop later
    job = training.submit("limit", *options, slow_step_s=0.2, num_steps=300)
    assert job.wait(1800) == ["COMPLETED"], job.tail()
    assert int(job.field("Restarts")) >= 1
    assert re.search(r"(signal USR1|time limit near) at", job.log)
    assert "thinker resumed from" in job.log
    assert [step for step, _ in training.curve("limit")] == list(range(1, 301))
    assert training.exported_step("limit") == 300


def test_run_survives_preemption(training: Training) -> None:
    if not training.cluster.is_testbed:
        pytest.skip("only the testbed is known to preempt")
    job = training.submit("preempted", slow_step_s=0.1, num_steps=100)
    training.wait_for_steps("preempted", job)
    command = "sbatch --parsable --partition=high --nodes=2 --exclusive --output=/dev/null"
    other = training.cluster.call(*command.split(), "--wrap", "sleep 3").strip()
    assert Job(training.cluster, other).wait(RUN_TIMEOUT_S) == ["COMPLETED"]
    assert job.wait(RUN_TIMEOUT_S) == ["COMPLETED"], job.tail()
    assert int(job.field("Restarts")) >= 1
    assert "thinker resumed from" in job.log
    assert [step for step, _ in training.curve("preempted")] == list(range(1, 101))


def test_canceled_job_is_not_requeued(training: Training) -> None:
    job = training.submit("canceled", slow_step_s=0.1, num_steps=1000)
    training.wait_for_steps("canceled", job)
    training.cluster.call("scancel", job.id)
    assert job.wait(120) == ["CANCELLED"]
    time.sleep(10)  # a requeued job would start after 5 s
    assert job.states() == ["CANCELLED"] and job.field("Restarts") == "0"


def test_user_error_fails_the_job_with_its_code_and_one_sentence(training: Training) -> None:
    job = training.cluster.submit(
        ["--nodes=2", f"--output={training.folder}/mistake-%j.log"],
        "train.sbatch", "--stage", "thinker", "--data", "/nowhere", "--run", f"{training.folder}/x",
    )  # fmt: skip
    assert job.wait(RUN_TIMEOUT_S) == ["FAILED"]
    assert (job.field("ExitCode"), job.field("Restarts")) == ("3:0", "0")
    assert job.log.count("data folder /nowhere does not exist") == 1
    assert "Traceback" not in job.log


@pytest.mark.parametrize(
    ("options", "local_ranks", "gpus"),
    [
        (["--gpus-per-node=2", "--cpus-per-task=8"], "0101", ["0,1"] * 4),
        (["--gres=gpu:2", "--ntasks-per-node=2", "--cpus-per-task=4"], "0101", ["0,1"] * 4),
        # Each task only sees its own GPU.
        (
            ["--gpus-per-task=1", "--ntasks-per-node=2", "--cpus-per-task=4"],
            "0000",
            ["0", "1", "0", "1"],
        ),
    ],
)
def test_one_rank_per_gpu_on_two_nodes(
    cluster: Cluster, tmp_path: Path, options: list[str], local_ranks: str, gpus: list[str]
) -> None:
    if not cluster.is_testbed:
        pytest.skip("only the testbed has two (fake) GPUs per node")
    job = cluster.submit(
        ["--nodes=2", *options, f"--output={tmp_path}/%j.log"],
        "train.sbatch", "tests/slurm/report_rank.py", OMP_NUM_THREADS="",
    )  # fmt: skip
    assert job.wait(120) == ["COMPLETED"], job.tail()
    ranks = [json.loads(line) for line in job.log.splitlines() if line.startswith("{")]
    ranks.sort(key=lambda rank: int(rank["RANK"]))
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert "".join(rank["LOCAL_RANK"] for rank in ranks) == local_ranks
    assert [rank["gpus"] for rank in ranks] == gpus
    assert {rank["OMP_NUM_THREADS"] for rank in ranks} == {"4"}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1
    if "MASTER_ADDR" not in cluster.environ:
        assert [rank["host"] for rank in ranks] == ["node1", "node1", "node2", "node2"]
        assert ranks[3]["MASTER_ADDR"] == "node1"


@pytest.mark.parametrize(
    "nodes", ["node[1-2]", "a[003-5,9],b1", "r[2,4]n[01-16]", "x1,x2", "n7-ib"]
)
def test_first_host_agrees_with_slurm(cluster: Cluster, nodes: str) -> None:
    assert first_host(nodes) == cluster.call("scontrol", "show", "hostnames", nodes).split()[0]
