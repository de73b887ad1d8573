"""No run leaves DeepSpeed's buffers in /dev/shm."""

import os

from muomni.training.engine.process_group import SHARED_MEMORY
from tests.ranks import RankPool


def _sum_and_look() -> tuple[float, list[str]]:
    import torch

    total = torch.ones(3)
    torch.distributed.all_reduce(total)
    port = os.environ["MASTER_PORT"]
    left = [path.name for path in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*")]
    return float(total.sum()), left


def test_ranks_reduce_through_unlinked_shared_memory(two_ranks: RankPool) -> None:
    assert two_ranks.run(_sum_and_look) == [(6.0, []), (6.0, [])]
