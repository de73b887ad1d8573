"""Which rank this process is, whoever started it: deepspeed, torchrun, srun, or nobody.

Plain `srun` sets none of the variables that torch.distributed reads, and DeepSpeed would then ask for
mpi4py; so they are derived from SLURM_* here, before any process group exists.
"""

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from muomni.errors import ConfigError


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
            int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]), "environment"
        )
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_STEP_ID") != "":
        ranks = Ranks(
            int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_NTASKS"]), "srun"
        )
    else:
        ranks = Ranks()
    if not 0 <= ranks.rank < ranks.world_size:
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.world_size} is impossible; check RANK and WORLD_SIZE"
        )
    return ranks


def export_environment(ranks: Ranks, environ: dict[str, str] | os._Environ[str]) -> None:
    """Set what torch.distributed and DeepSpeed read, where the launcher did not."""
    environ.setdefault("RANK", str(ranks.rank))
    environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    if ranks.launcher == "srun":
        environ.setdefault("MASTER_ADDR", _first_host(environ))
        # One port a job: two jobs that share a node must not meet.
        environ.setdefault(
            "MASTER_PORT", str(20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 10_000)
        )
    elif ranks.launcher == "alone":
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(_free_port()))


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    if int(environ.get("SLURM_JOB_NUM_NODES", "1")) == 1 or not nodes:
        return "127.0.0.1"
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"cannot expand SLURM_JOB_NODELIST={nodes} with scontrol ({error}); export MASTER_ADDR"
        ) from None
    return listing.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
