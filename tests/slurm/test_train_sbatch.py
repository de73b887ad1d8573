"""slurm/train.sbatch on a fake cluster: started ranks, signals, and requeues."""

import datetime
import re
import signal
import time

import pytest

from tests.slurm.conftest import ROOT, FakeCluster

KILLED = -signal.SIGKILL  # what Slurm does to the script of a requeued job
# Simulates ranks that stop at the second USR1, as if one was still starting at the first.
STOPS_AT_SECOND_SIGNAL = """
n=0; trap 'n=$((n + 1))' USR1; touch up
while [ $n -lt 2 ]; do sleep 0.1; done; exit 85
"""
IGNORES_SIGNAL = "trap '' USR1; touch up; for i in {1..80}; do sleep 0.1; done"


def wait_until_up(cluster: FakeCluster) -> None:
    deadline = time.monotonic() + 20
    while not (cluster.folder / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def signaled(cluster: FakeCluster, program: str, **environ: str) -> tuple[int, str]:
    """Run train.sbatch with ranks simulated by `program` and signal it once they are up."""
    process = cluster.start("train.sbatch", FAKE_SRUN=program, **environ)
    wait_until_up(cluster)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_one_task_per_gpu_and_arguments_pass_through(cluster: FakeCluster) -> None:
    arguments = ("--stage", "sft", "--preset", "small", "data.root=a b")
    code, output = cluster.run("train.sbatch", *arguments, SLURM_GPUS_ON_NODE="4")
    assert code == 0, output
    (call,) = cluster.calls_of("srun")
    assert "<--ntasks=8> <--ntasks-per-node=4> <--cpus-per-task=2>" in call
    assert f"<{ROOT}/launch/train.py> <--stage> <sft> <--preset> <small> <data.root=a b>" in call
    port = re.search(r"port=(\d+) threads=2", call)
    assert port and 20_000 <= int(port.group(1)) < 32_000


def test_a_small_global_batch_leaves_surplus_ranks_out(cluster: FakeCluster) -> None:
    arguments = ("--stage", "thinker", "batch.seq_len=64", "batch.global_tokens=320")
    code, output = cluster.run("train.sbatch", *arguments, SLURM_GPUS_ON_NODE="4")
    assert code == 0 and "5 of 8 ranks train" in output
    (call,) = cluster.calls_of("srun")
    assert "<--nodes=2> <--ntasks=5> <--ntasks-per-node=4>" in call


@pytest.mark.parametrize(
    ("environ", "num_tasks"),
    [
        ({}, 1),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"MUOMNI_TASKS_PER_NODE": "4", "SLURM_NTASKS_PER_NODE": "2"}, 4),
        ({"MUOMNI_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "4"}, 2),
    ],
)
def test_number_of_ranks_per_node(
    cluster: FakeCluster, environ: dict[str, str], num_tasks: int
) -> None:
    cluster.run("train.sbatch", **environ)
    tasks = f"<--ntasks={2 * num_tasks}> <--ntasks-per-node={num_tasks}>"
    assert f"{tasks} <--cpus-per-task={8 // num_tasks}>" in cluster.calls_of("srun")[0]


def test_options_of_srun_and_recorded_collectives(cluster: FakeCluster) -> None:
    program = 'echo "recorder: $TORCH_FR_BUFFER_SIZE $TORCH_NCCL_DUMP_ON_TIMEOUT $TORCH_FR_DUMP_TEMP_FILE"'
    options = "--container-image=a.sqsh --cpu-bind=cores"
    _, output = cluster.run("train.sbatch", MUOMNI_SRUN_OPTIONS=options, FAKE_SRUN=program)
    assert "<--container-image=a.sqsh> <--cpu-bind=cores> <bash>" in cluster.calls_of("srun")[0]
    assert f"recorder: 2000 1 {cluster.folder}/nccl-7-rank\n" in output
    cluster.run("train.sbatch")
    assert "<--distribution=block:block>" in cluster.calls_of("srun")[1]
    assert "<--input=none> <bash>" in cluster.calls_of("srun")[1]


def test_other_programs_can_run(cluster: FakeCluster) -> None:
    cluster.run("train.sbatch", "launch/evaluate.py", "--stage", "codec")
    assert f"<{ROOT}/launch/evaluate.py> <--stage> <codec>" in cluster.calls_of("srun")[0]


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"MUOMNI_ROOT": "/nowhere"},
            "/nowhere/launch/train.py does not exist; submit from the repository",
        ),
        ({"MUOMNI_VENV": "/nowhere"}, "no Python environment in /nowhere; run make install"),
        (
            {"MUOMNI_TASKS_PER_NODE": "two"},
            "MUOMNI_TASKS_PER_NODE must be a positive integer, got two",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "16"},
            "16 ranks per node need at least 16 cores, but the job has 8",
        ),
    ],
)
def test_missing_requirement_is_one_sentence(
    cluster: FakeCluster, environ: dict[str, str], sentence: str
) -> None:
    code, output = cluster.run("train.sbatch", "--stage", "sft", **environ)
    assert code == 2
    assert sentence in output and len(output.splitlines()) == 1
    assert not cluster.calls


def test_failure_fails_the_job_with_its_code(cluster: FakeCluster) -> None:
    code, output = cluster.run("train.sbatch", FAKE_SRUN="exit 3")
    assert code == 3 and "failed with exit code 3" in output
    assert "scontrol requeue 7" not in cluster.calls


def test_saved_run_is_requeued(cluster: FakeCluster) -> None:
    code, output = cluster.run("train.sbatch", FAKE_SRUN="exit 85", SLURM_RESTART_COUNT="4")
    assert code == KILLED
    assert cluster.calls[-1] == "scontrol requeue 7"
    assert "requeue 5 of at most 20: the run was stopped and its state is saved" in output


def test_requeues_are_limited(cluster: FakeCluster) -> None:
    limit = {"SLURM_RESTART_COUNT": "2", "MUOMNI_MAX_REQUEUES": "2"}
    code, output = cluster.run("train.sbatch", FAKE_SRUN="exit 85", **limit)
    assert code == 85
    assert "stopped after 2 requeues (MUOMNI_MAX_REQUEUES=2); submit the same command" in output
    assert "scontrol requeue 7" not in cluster.calls


def test_canceled_job_is_not_requeued(cluster: FakeCluster) -> None:
    code, output = cluster.run("train.sbatch", FAKE_SRUN="exit 85", FAKE_STATE="CANCELLED")
    assert code == 85 and "the job was canceled" in output
    assert "scontrol requeue 7" not in cluster.calls


@pytest.mark.parametrize(
    ("state", "end", "sentence"),
    [
        ("PREEMPTED", "Unknown", "Slurm requeues the job itself"),
        ("COMPLETING", "Unknown", "if it was canceled, submit the same command"),
        ("COMPLETING", "2100-01-01T00:00:00", "if it was canceled, submit the same command"),
    ],
)
def test_jobs_that_slurm_ends_or_requeues_are_not_requeued(
    state: str, end: str, sentence: str, cluster: FakeCluster
) -> None:
    process = cluster.start("train.sbatch", FAKE_SRUN="exit 85", FAKE_STATE=state, FAKE_END=end)
    assert process.stdout is not None
    while sentence not in (line := process.stdout.readline()):
        assert line, "the script ended"
    time.sleep(0.5)
    assert process.poll() is None  # otherwise Slurm would consider the job completed
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert "scontrol requeue 7" not in cluster.calls


def test_job_that_slurm_ends_at_its_time_limit_is_requeued(
    cluster: FakeCluster,
) -> None:
    end = (datetime.datetime.now() - datetime.timedelta(seconds=5)).isoformat(timespec="seconds")
    late = {"FAKE_SRUN": "exit 85", "FAKE_STATE": "COMPLETING", "FAKE_END": end}
    code, _ = cluster.run("train.sbatch", **late)
    assert code == KILLED and cluster.calls[-1] == "scontrol requeue 7"


def test_no_time_limit_if_scontrol_fails(cluster: FakeCluster) -> None:
    code, output = cluster.run("train.sbatch", FAKE_SRUN="sleep 2", FAKE_SHOW="refused")
    assert code == 0 and "time limit near" not in output


def test_failed_requeue_fails_the_job(cluster: FakeCluster) -> None:
    code, output = cluster.run("train.sbatch", FAKE_SRUN="exit 85", FAKE_REQUEUE="refused")
    assert code == 85 and "scontrol requeue 7 failed; submit the same command" in output


def test_signal_is_forwarded_until_the_ranks_stop(cluster: FakeCluster) -> None:
    code, output = signaled(cluster, STOPS_AT_SECOND_SIGNAL)
    assert code == KILLED
    assert re.search(r"signal USR1 at [\d:]+: the ranks save and stop", output)
    assert cluster.calls[-1] == "scontrol requeue 7"


@pytest.mark.parametrize(
    ("limit_s", "before_s", "stops"),
    [(12, "6", True), (60, "6", False), (8, "110", True)],
)
def test_time_limit_stops_the_run_without_a_signal(
    cluster: FakeCluster, limit_s: int, before_s: str, stops: bool
) -> None:
    end = datetime.datetime.now() + datetime.timedelta(seconds=limit_s)
    environ = {"FAKE_END": end.isoformat(timespec="seconds"), "MUOMNI_STOP_BEFORE_S": before_s}
    num_naps = 200 if stops else 10
    program = f"trap 'exit 85' USR1; for i in {{1..{num_naps}}}; do sleep 0.1; done"
    code, output = cluster.run("train.sbatch", FAKE_SRUN=program, **environ)
    assert code == (KILLED if stops else 0)
    assert ("time limit near at" in output) is stops


def test_run_resumes_from_the_last_checkpoint_if_ranks_do_not_save_in_time(
    cluster: FakeCluster,
) -> None:
    code, output = signaled(cluster, IGNORES_SIGNAL, MUOMNI_STOP_GRACE_S="2")
    assert code == KILLED
    assert "the ranks did not save within 2 s; the run resumes from its last checkpoint" in output


@pytest.mark.parametrize("is_signaled", [True, False])
def test_rank_killed_by_the_signal_is_not_a_failure(
    cluster: FakeCluster, is_signaled: bool
) -> None:
    if is_signaled:
        code, _ = signaled(cluster, "touch up; sleep 1 & wait; exit 138")
    else:
        code, _ = cluster.run("train.sbatch", FAKE_SRUN="exit 138")
    assert code == (KILLED if is_signaled else 138)
    assert ("scontrol requeue 7" in cluster.calls) is is_signaled


def test_run_that_finishes_after_the_signal_is_complete(cluster: FakeCluster) -> None:
    code, _ = signaled(cluster, "trap '' USR1; touch up; sleep 2; exit 0")
    assert code == 0
    assert "scontrol requeue 7" not in cluster.calls


def test_script_waits_for_its_ranks_after_term(cluster: FakeCluster) -> None:
    """Preemption without a configured signal: ranks and script receive TERM."""
    program = "touch up; while [ ! -e stop ]; do sleep 0.1; done; exit 85"
    process = cluster.start("train.sbatch", FAKE_SRUN=program)
    wait_until_up(cluster)
    process.send_signal(signal.SIGTERM)
    (cluster.folder / "stop").touch()
    process.communicate(timeout=60)
    assert process.returncode == KILLED
    assert cluster.calls[-1] == "scontrol requeue 7"
