"""Rank discovery under each launcher, and errors for inconsistent variables."""

import os
import socket
import subprocess
import sys

import pytest

from muomni.distributed.discovery import (
    Ranks,
    check_master_port,
    cores_of_rank,
    discover,
    export_environment,
    first_host,
    free_port,
    keep_first,
    num_local_ranks,
)
from muomni.errors import ConfigError, MachineError

# The variables of the second task on the second of two nodes.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
}

RENDEZVOUS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
LAUNCHED = {**RENDEZVOUS, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
MPIRUN = {
    **RENDEZVOUS,
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def exported(environ: dict[str, str]) -> dict[str, str]:
    """The environment after `export_environment`."""
    environ = dict(environ)
    export_environment(discover(environ), environ)
    return environ


def test_launcher_variables_take_precedence_over_slurm() -> None:
    launched = {**SRUN, **LAUNCHED}
    assert discover(launched) == Ranks(1, 1, 2, "environment")
    assert exported(launched) == launched


def test_srun_sets_all_variables_of_torch() -> None:
    assert discover(SRUN) == Ranks(3, 1, 4, "srun")
    environ = exported(SRUN)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("3", "1", "4")
    assert environ["MASTER_ADDR"] == "node1"
    assert 20_000 <= int(environ["MASTER_PORT"]) < 30_000
    assert "LOCAL_SIZE" not in environ


def test_one_node_uses_loopback_and_shared_memory() -> None:
    environ = exported({**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "node2"})
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert environ["LOCAL_SIZE"] == "4"


def test_world_size_is_that_of_the_step() -> None:
    step = {**SRUN, "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "16"}
    assert discover({**step, "SLURM_STEP_NODELIST": "node2"}).world_size == 4


def test_ports_differ_between_jobs_and_restarts() -> None:
    ports = {
        exported({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)})[
            "MASTER_PORT"
        ]
        for job in range(100, 120)
        for restart in range(20)
    }
    assert len(ports) == 400


def test_existing_variables_are_kept() -> None:
    environ = exported({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "7")


@pytest.mark.parametrize("step", ["4294967291", "4294967290", ""])
def test_batch_scripts_and_interactive_allocations_are_single_ranks(step: str) -> None:
    batch = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": step}
    assert discover(batch) == Ranks()
    batch.pop("SLURM_STEP_ID")
    assert discover(batch) == Ranks()


@pytest.mark.parametrize(("visible", "local_rank"), [("2", 0), ("0,1", 1), ("", 1)])
def test_task_with_one_visible_gpu_uses_it(visible: str, local_rank: int) -> None:
    assert discover({**SRUN, "CUDA_VISIBLE_DEVICES": visible}).local_rank == local_rank


def test_no_launcher_is_one_rank_on_a_free_port() -> None:
    environ = exported({})
    assert discover({}) == Ranks()
    with socket.socket() as probe:
        probe.bind((environ["MASTER_ADDR"], int(environ["MASTER_PORT"])))
    assert free_port() > 0


def test_mpirun_needs_no_mpi4py() -> None:
    assert discover(MPIRUN) == Ranks(3, 1, 4, "mpirun")
    environ = exported(MPIRUN)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("3", "1", "4")
    assert environ["LOCAL_WORLD_SIZE"] == "2" and "LOCAL_SIZE" not in environ


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**LAUNCHED, "RANK": "2"}, "rank 2 is invalid for 2 ranks"),
        ({**LAUNCHED, "RANK": "-1"}, "rank -1 is invalid for 2 ranks"),
        ({**LAUNCHED, "RANK": "one"}, "RANK must be an integer, got 'one'"),
        ({**LAUNCHED, "RANK": ""}, "RANK must be an integer, got ''"),
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not; start ranks with deepspeed"),
        ({"WORLD_SIZE": "2", **SRUN}, "WORLD_SIZE is set, but RANK is not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set, but RANK and WORLD_SIZE are not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 ranks need MASTER_ADDR and MASTER_PORT"),
        ({**LAUNCHED, "MASTER_ADDR": ""}, "2 ranks need MASTER_ADDR, the address of rank 0"),
        ({**LAUNCHED, "MASTER_PORT": "x"}, "MASTER_PORT must be an integer, got 'x'"),
        ({**LAUNCHED, "MASTER_PORT": "70000"}, "MASTER_PORT must be between 1 and 65535, got 70000"),
        ({**SRUN, "SLURM_LOCALID": ""}, "SLURM_LOCALID must be an integer, got ''"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID must be an integer, got 'x'"),
        ({**MPIRUN, "MASTER_PORT": ""}, r"4 ranks need MASTER_PORT.*mpirun -x NAME=VALUE"),
    ],
)  # fmt: skip
def test_incomplete_and_inconsistent_variables_are_rejected(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        discover(environ)


def test_a_single_rank_of_a_launcher_needs_no_address() -> None:
    environ = exported({"RANK": "0", "WORLD_SIZE": "1"})
    assert environ["MASTER_ADDR"] == "127.0.0.1" and int(environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "1"}, 1),
        ({"SLURM_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "2"}, 1),
        ({"SLURM_STEP_NUM_NODES": "1"}, 4),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({}, None),
    ],
)
def test_number_of_ranks_on_this_node(changes: dict[str, str], number: int | None) -> None:
    assert num_local_ranks({**SRUN, **changes}) == number
    assert exported({**SRUN, **changes}).get("LOCAL_WORLD_SIZE") == (number and str(number))


def test_a_port_in_use_is_reported_before_torch_starts() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = str(listener.getsockname()[1])
        with pytest.raises(MachineError, match=f"port {port} is in use.*--master_port"):
            check_master_port(Ranks(), {"MASTER_PORT": port})
        check_master_port(Ranks(rank=1, world_size=2), {"MASTER_PORT": port})
        # torchrun listens for its ranks.
        check_master_port(Ranks(), {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    check_master_port(Ranks(), {"MASTER_PORT": port})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node7", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("rack[2,4]n[01-16]", "rack2n01"),
        ("a-b.site.org", "a-b.site.org"),
        ("n[7-8]-ib,n1", "n7-ib"),
    ],
)
def test_first_host_of_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["[1-2", "", "node[", "a b"])
def test_invalid_node_list_asks_for_master_addr(nodes: str) -> None:
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        first_host(nodes)


def test_two_srun_tasks_connect_without_mpi4py() -> None:
    """The exported variables are sufficient for init_process_group."""
    program = (
        "import os\n"
        "from muomni.distributed.discovery import discover, export_environment\n"
        "export_environment(discover(), os.environ)\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "ranks = [None, None]\n"
        "dist.all_gather_object(ranks, dist.get_rank())\n"
        "print(ranks)\n"
        "dist.destroy_process_group()\n"
    )
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**clean, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["[0, 1]"] * 2


def test_ranks_of_a_node_share_its_cores_unless_srun_divides_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert cores_of_rank({}) == 64
    assert cores_of_rank({"LOCAL_WORLD_SIZE": "8"}) == cores_of_rank({"LOCAL_SIZE": "8"}) == 8
    assert cores_of_rank({"LOCAL_SIZE": "100"}) == 1
    alone = {**SRUN, "SLURM_CPUS_PER_TASK": "12"}
    assert cores_of_rank(alone) == cores_of_rank(exported(alone)) == 12
    # A launcher inside one task starts several ranks on its cores.
    launched = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "8"}
    assert cores_of_rank(launched) == 8


def test_the_first_ranks_form_a_smaller_job() -> None:
    environ = {"WORLD_SIZE": "8", "LOCAL_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    assert keep_first(Ranks(5, 1, 8, "environment"), 6, environ) == Ranks(5, 1, 6, "environment")
    assert environ == {"WORLD_SIZE": "6", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
