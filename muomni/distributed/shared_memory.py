"""Gives back the shared memory of DeepSpeed's CPU collectives when a run ends, however it ends.

The shared-memory op makes one file of 69 MB a rank in /dev/shm and never removes it; runs would fill the
memory of the machine. Once every rank has mapped all files their names are needed no more, and without a
name the system frees the memory with the last process.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from muomni.distributed import collectives

SHARED_MEMORY = Path("/dev/shm")


def release_names(environ: Mapping[str, str]) -> None:
    """Remove the name of this rank's buffer; every rank must call it after the process group started."""
    collectives.barrier()  # behind it, every rank has mapped the buffers of all
    address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{collectives.rank()}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)
