"""Find the rank of this process under deepspeed, torchrun, srun, mpirun, or no launcher.

Plain `srun` and `mpirun` do not set the variables that torch.distributed reads, and DeepSpeed would then
require mpi4py. They are derived here, before the process group is created.
"""

import errno
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from muomni.errors import ConfigError, MachineError

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
    """Read the rank from RANK, LOCAL_RANK, and WORLD_SIZE, or from SLURM_* or OMPI_*; the default is one rank.

    Raises ConfigError if the variables are incomplete or inconsistent.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        _check_complete(env)
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
    elif "OMPI_COMM_WORLD_RANK" in env:
        ranks = Ranks(
            _number(env, "OMPI_COMM_WORLD_RANK"),
            _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
            _number(env, "OMPI_COMM_WORLD_SIZE"),
            "mpirun",
        )
    else:
        _check_complete(env)
        ranks = Ranks()
    if not 0 <= ranks.rank < ranks.world_size:
        raise ConfigError(
            f"rank {ranks.rank} is invalid for {ranks.world_size} ranks; check RANK and WORLD_SIZE"
        )
    _check_rendezvous(env, ranks)
    return ranks


def job_name(environ: Mapping[str, str] | None = None) -> str | None:
    """A name that this job keeps when it is restarted; None if nothing restarts it."""
    env = os.environ if environ is None else environ
    if "SLURM_JOB_ID" in env:
        return f"slurm {env['SLURM_JOB_ID']}"
    if "TORCHELASTIC_RUN_ID" in env:
        return f"torchrun {env['TORCHELASTIC_RUN_ID']}"
    return None


def is_restarted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether Slurm has requeued this job, or torchrun has restarted its ranks."""
    env = os.environ if environ is None else environ
    counts = (env.get("SLURM_RESTART_COUNT", ""), env.get("TORCHELASTIC_RESTART_COUNT", ""))
    return any(count.isdigit() and int(count) for count in counts)


def export_environment(ranks: Ranks, environ: dict[str, str] | os._Environ[str]) -> None:
    """Set the variables that torch.distributed and DeepSpeed read, unless the launcher has set them.

    Raises ConfigError if MASTER_ADDR is unset and Slurm's node list cannot be parsed.
    """
    environ.setdefault("RANK", str(ranks.rank))
    environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    if ranks.launcher in ("srun", "mpirun"):
        num_local = num_local_ranks(environ)
        if num_local is not None:
            environ.setdefault("LOCAL_WORLD_SIZE", str(num_local))
        if num_local == ranks.world_size:
            # As DeepSpeed's launcher does; lets ranks of one node communicate through shared memory.
            environ.setdefault("LOCAL_SIZE", str(num_local))
    if ranks.launcher == "srun":
        if "MASTER_ADDR" not in environ:
            environ["MASTER_ADDR"] = _master_address(environ)
        # One port per job and restart, so that jobs on a shared node do not collide.
        start = _number(environ, "SLURM_JOB_ID", 0) * 31 + _number(
            environ, "SLURM_RESTART_COUNT", 0
        )
        environ.setdefault("MASTER_PORT", str(_FIRST_PORT + start % _NUM_PORTS))
    elif ranks.world_size == 1:
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(free_port()))


def cores_of_rank(environ: Mapping[str, str] | None = None) -> int:
    """CPU cores that this rank may use: its own ones under srun, else an equal share of the node's."""
    env = os.environ if environ is None else environ
    num_visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    num_tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
    if _is_srun_task(env) and env.get("WORLD_SIZE", num_tasks) == num_tasks:
        return min(num_visible, _number(env, "SLURM_CPUS_PER_TASK", num_visible))
    return max(1, num_visible // max(1, num_local_ranks(env) or 1))


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


def num_local_ranks(environ: Mapping[str, str]) -> int | None:
    """The number of ranks on this node, None if the launcher does not tell."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in environ:
            return _number(environ, name)
    if _is_srun_task(environ):
        return _slurm_local_ranks(environ)
    return None


def check_master_port(ranks: Ranks, environ: Mapping[str, str]) -> None:
    """Raise MachineError on rank 0 if another process listens on MASTER_PORT.

    torch would fail with a traceback, and the other ranks would connect to the wrong process. Under torchrun,
    the listener is torchrun itself.
    """
    if not ranks.is_main or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = _number(environ, "MASTER_PORT")
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=is_dual).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise MachineError(f"cannot listen on MASTER_PORT={port}: {error.strerror}") from None
        raise port_in_use(port) from None


def port_in_use(port: int | str) -> MachineError:
    """The error for a MASTER_PORT that another process listens on."""
    return MachineError(
        f"port {port} is in use, perhaps by another run on this machine; choose another one with deepspeed "
        f"--master_port PORT, or with MASTER_PORT"
    )


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


def _check_complete(env: Mapping[str, str]) -> None:
    """Raise ConfigError if only some of the variables of a launcher are set."""
    needed = ("RANK", "WORLD_SIZE")
    missing = [name for name in needed if name not in env]
    given = [name for name in (*needed, "LOCAL_RANK") if name in env]
    if given and missing:
        raise ConfigError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; start ranks with deepspeed, torchrun, or srun, or "
            f"unset {' and '.join(given)}"
        )


def _check_rendezvous(env: Mapping[str, str], ranks: Ranks) -> None:
    """Raise ConfigError if several ranks do not know where to connect, or the port is invalid."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing and ranks.world_size > 1 and ranks.launcher != "srun":
        remedy = "start with deepspeed or torchrun, or set them for every rank"
        if ranks.launcher == "mpirun":
            remedy = "set them with mpirun -x NAME=VALUE"
        raise ConfigError(
            f"{ranks.world_size} ranks need {' and '.join(missing)}, the address of rank 0; {remedy}"
        )
    if "MASTER_PORT" in env and not 0 < _number(env, "MASTER_PORT") < 2**16:
        raise ConfigError(f"MASTER_PORT must be between 1 and 65535, got {env['MASTER_PORT']}")


def _is_srun_task(env: Mapping[str, str]) -> bool:
    # A batch script also has SLURM_PROCID=0, but no other ranks run next to it.
    step = env.get("SLURM_STEP_ID", "")
    is_task = "SLURM_PROCID" in env and _number(env, "SLURM_PROCID") >= 0
    return is_task and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _slurm_local_ranks(env: Mapping[str, str]) -> int | None:
    """This node's entry in a list such as `4(x2),1`: four ranks on two nodes, one on the third."""
    if _num_nodes(env) == 1:
        name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        return _number(env, name)
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else None


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
