"""Find the rank of this process under deepspeed, torchrun, srun, or no launcher.

Plain `srun` does not set the variables that torch.distributed reads, and DeepSpeed would then require
mpi4py. They are derived from SLURM_* here, before the process group is created.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from muomni.errors import ConfigError

# Slurm step ids from here on are not srun steps (batch scripts, interactive allocations).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of this process and its launcher."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: str = "alone"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def discover(environ: Mapping[str, str] | None = None) -> Ranks:
    """Read the rank from RANK, LOCAL_RANK, and WORLD_SIZE, or from SLURM_*; the default is one rank.

    Raises ConfigError if the variables are inconsistent.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        ranks = Ranks(
            _number(env, "RANK"),
            _number(env, "LOCAL_RANK", 0),
            _number(env, "WORLD_SIZE"),
            "environment",
        )
    elif _is_srun_task(env):
        ranks = Ranks(
            _number(env, "SLURM_PROCID"),
            _slurm_local_rank(env),
            _number(
                env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
            ),
            "srun",
        )
    else:
        ranks = Ranks()
    if not 0 <= ranks.rank < ranks.world_size:
        raise ConfigError(
            f"rank {ranks.rank} is invalid for {ranks.world_size} ranks; check RANK and WORLD_SIZE"
        )
    return ranks


def export_environment(ranks: Ranks, environ: dict[str, str] | os._Environ[str]) -> None:
    """Set the variables that torch.distributed and DeepSpeed read, unless the launcher has set them.

    Raises ConfigError if MASTER_ADDR is unset and Slurm's node list cannot be parsed.
    """
    environ.setdefault("RANK", str(ranks.rank))
    environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    if ranks.launcher == "srun":
        if "MASTER_ADDR" not in environ:
            environ["MASTER_ADDR"] = _master_address(environ)
        # One port per job and restart, so that jobs on a shared node do not collide.
        start = _number(environ, "SLURM_JOB_ID", 0) * 31 + _number(
            environ, "SLURM_RESTART_COUNT", 0
        )
        environ.setdefault("MASTER_PORT", str(_FIRST_PORT + start % _NUM_PORTS))
        if _num_nodes(environ) == 1:
            # As DeepSpeed's launcher does; lets ranks of one node communicate through shared memory.
            environ.setdefault("LOCAL_SIZE", str(ranks.world_size))
    elif ranks.launcher == "alone":
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(free_port()))


def cores_of_rank(environ: Mapping[str, str] | None = None) -> int:
    """CPU cores that this rank may use: its own ones under srun, else an equal share of the node's."""
    env = os.environ if environ is None else environ
    num_visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    num_tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
    if _is_srun_task(env) and env.get("WORLD_SIZE", num_tasks) == num_tasks:
        return min(num_visible, _number(env, "SLURM_CPUS_PER_TASK", num_visible))
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
    return max(1, num_visible // max(1, _number(env, name, 1)))


def keep_first(ranks: Ranks, num_ranks: int, environ: dict[str, str] | os._Environ[str]) -> Ranks:
    """This rank among the first `num_ranks` only, which export the environment of a smaller job.

    The caller ends the other ranks.
    """
    environ["WORLD_SIZE"] = str(num_ranks)
    num_on_node = num_ranks - (ranks.rank - ranks.local_rank)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if name in environ:
            environ[name] = str(min(int(environ[name]), num_on_node))
    return replace(ranks, world_size=num_ranks)


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `gpu03` for `gpu[03-05,9],login1`.

    Does not use `scontrol`, which containers often lack. Raises ConfigError if the list cannot be parsed.
    """
    parts = re.match(r"[^,\[\]]+(?:\[[^\[\]]*\][^,\[\]]*)*(?=,|$)", nodes)
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", parts.group()) if parts else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise ConfigError(f"cannot parse the Slurm node list '{nodes}'; export MASTER_ADDR")
    return host


def _is_srun_task(env: Mapping[str, str]) -> bool:
    # A batch script also has SLURM_PROCID=0, but no other ranks run next to it.
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in env and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _slurm_local_rank(env: Mapping[str, str]) -> int:
    local_rank = _number(env, "SLURM_LOCALID")
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    # With --gpus-per-task or --gpu-bind, a task sees only its own GPU, as number 0.
    return 0 if visible and "," not in visible else local_rank


def _master_address(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    return "127.0.0.1" if _num_nodes(env) == 1 or not nodes else first_host(nodes)


def _num_nodes(env: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in env else "SLURM_JOB_NUM_NODES"
    return _number(env, name, 1)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name} must be an integer, got '{text}'") from None
