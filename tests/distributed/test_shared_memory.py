"""DeepSpeed's buffers in /dev/shm are unlinked."""

import os

from muomni.distributed.shared_memory import SHARED_MEMORY
from tests.ranks import RankPool


def _sum_and_list_buffers() -> tuple[float, list[str]]:
    import torch

    total = torch.ones(3)
    torch.distributed.all_reduce(total)
    port = os.environ["MASTER_PORT"]
    buffers = [path.name for path in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*")]
    return float(total.sum()), buffers


def test_ranks_reduce_through_unlinked_buffers(two_ranks: RankPool) -> None:
    assert two_ranks.run(_sum_and_list_buffers) == [(6.0, []), (6.0, [])]
