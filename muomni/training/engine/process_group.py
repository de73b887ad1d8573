"""Start and stop of the process group, and release of DeepSpeed's shared memory.

DeepSpeed's shared-memory op creates a file of 69 MB per rank in /dev/shm and never removes it, so runs
would fill the memory of the machine. Once every rank has mapped all files, their names are not needed;
without a name, the system frees the memory with the last process, however it ends.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch

from muomni.distributed import collectives
from muomni.distributed.compiler import add_interpreter_folder, missing_for_compiling
from muomni.training.engine import deepspeed_quirks as quirks

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Run the block inside a process group of all ranks: NCCL on GPUs, gloo on CPUs."""
    quirks.ignore_deprecated_collectives()
    add_interpreter_folder(os.environ)
    missing = missing_for_compiling(os.environ) if device.type == "cpu" else None
    if missing is not None:
        logger.warning(
            "DeepSpeed's shared-memory op needs %s; using gloo, which is slower", missing
        )
        quirks.disable_shared_memory_op()
    with quirks.quiet_deepspeed():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":
        release_shared_memory(os.environ)
    try:
        yield
    finally:
        deepspeed.comm.destroy_process_group()


def release_shared_memory(environ: Mapping[str, str]) -> None:
    """Unlink this rank's buffer; every rank must call it after the process group has started."""
    collectives.barrier()  # afterward, every rank has mapped the buffers of all ranks
    address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{collectives.rank()}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)
