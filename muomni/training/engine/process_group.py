"""Start and stop of the process group, and release of DeepSpeed's shared memory.

DeepSpeed's shared-memory op creates a file of 69 MB per rank in /dev/shm and never removes it, so runs
would fill the memory of the machine. Once every rank has mapped all files, their names are not needed;
without a name, the system frees the memory with the last process, however it ends.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch

from muomni.distributed import collectives
from muomni.distributed.compiler import add_interpreter_folder, missing_for_extensions
from muomni.distributed.discovery import port_in_use
from muomni.errors import MachineError
from muomni.training.engine import deepspeed_quirks as quirks

logger = logging.getLogger(__name__)

TIMEOUT_S = 1800.0
SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def process_group(device: torch.device, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Run the block inside a process group of all ranks: NCCL on GPUs, gloo on CPUs.

    A collective that takes longer than `timeout_s` ends the run. Raises MachineError if ranks cannot connect.

    After an exception the group is not destroyed, since that waits for peers: `exit_rank_on_error` prints the
    error and ends the process.
    """
    quirks.ignore_deprecated_collectives()
    quirks.log_prints_of_start()
    add_interpreter_folder(os.environ)
    missing = missing_for_extensions(os.environ) if device.type == "cpu" else None
    if missing is not None:
        logger.warning(
            "DeepSpeed's shared-memory op needs %s; using gloo, which is slower", missing
        )
        quirks.disable_shared_memory_op()
    try:
        with quirks.quiet_deepspeed():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_s),
            )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise _connection_error(error, os.environ) from None
    if device.type == "cpu":
        release_shared_memory(os.environ)
    yield
    deepspeed.comm.destroy_process_group()


def _connection_error(error: Exception, environ: Mapping[str, str]) -> MachineError:
    address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error):
        found = port_in_use(port)
    else:
        reason = str(error).split("\n")[0]
        found = MachineError(
            f"rank {environ['RANK']} cannot connect to the others through {address}:{port} ({reason}); check "
            f"MASTER_ADDR, firewalls, and whether all ranks have started"
        )
    found.is_rank_local = True
    return found


def release_shared_memory(environ: Mapping[str, str]) -> None:
    """Unlink this rank's buffer; every rank must call it after the process group has started."""
    collectives.barrier()  # afterward, every rank has mapped the buffers of all ranks
    address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{collectives.rank()}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)
