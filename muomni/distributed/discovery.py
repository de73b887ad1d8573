"""Which rank this process is, whoever started it: deepspeed, torchrun, srun, or nobody.

Plain `srun` sets none of the variables that torch.distributed reads, and DeepSpeed would then ask for
mpi4py; so they are derived from SLURM_* here, before any process group exists.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from muomni.errors import ConfigError

# Slurm numbers what is no srun step (the batch script, an interactive allocation) from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all: `rank` of `world_size`, `local_rank` on its node."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: str = "alone"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def discover(environ: Mapping[str, str] | None = None) -> Ranks:
    """Read the rank from RANK/LOCAL_RANK/WORLD_SIZE, else from SLURM_*, else be the only rank.

    Raises ConfigError when the variables contradict each other.
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
            f"rank {ranks.rank} of {ranks.world_size} is impossible; check RANK and WORLD_SIZE"
        )
    return ranks


def export_environment(ranks: Ranks, environ: dict[str, str] | os._Environ[str]) -> None:
    """Set what torch.distributed and DeepSpeed read, where the launcher did not.

    Raises ConfigError when Slurm's list of nodes cannot be read and MASTER_ADDR is not set.
    """
    environ.setdefault("RANK", str(ranks.rank))
    environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    if ranks.launcher == "srun":
        if "MASTER_ADDR" not in environ:
            environ["MASTER_ADDR"] = _master_address(environ)
        # One port a job and start: two jobs that share a node must not meet.
        start = _number(environ, "SLURM_JOB_ID", 0) * 31 + _number(
            environ, "SLURM_RESTART_COUNT", 0
        )
        environ.setdefault("MASTER_PORT", str(_FIRST_PORT + start % _NUM_PORTS))
        if _num_nodes(environ) == 1:
            # DeepSpeed's launcher says so, too: ranks of one node may talk through shared memory.
            environ.setdefault("LOCAL_SIZE", str(ranks.world_size))
    elif ranks.launcher == "alone":
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(free_port()))


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],login1` gives `gpu03`.

    Containers often lack `scontrol`, which would expand the list. Raises ConfigError when the list has
    another form.
    """
    parts = re.match(r"[^,\[\]]+(?:\[[^\[\]]*\][^,\[\]]*)*(?=,|$)", nodes)
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", parts.group()) if parts else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise ConfigError(f"cannot read the Slurm node list '{nodes}'; export MASTER_ADDR")
    return host


def _is_srun_task(env: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID=0, too, but is no rank: nobody would start the others.
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in env and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _slurm_local_rank(env: Mapping[str, str]) -> int:
    local_rank = _number(env, "SLURM_LOCALID")
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    # With --gpus-per-task or --gpu-bind a task sees its own GPU only, and that is number 0.
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
        raise ConfigError(f"environment variable {name}='{text}' must be a whole number") from None
