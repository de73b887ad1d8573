"""Test the rank pool, and that DeepSpeed trains on it: a smoke test of the environment."""

import gc
import os
import sys
import time
from pathlib import Path

import deepspeed
import pytest
import torch
from torch import nn

from muomni.errors import DataError
from tests.ranks import RankError, RankPool, RankTracebackError


def describe_rank() -> tuple[int, int, str, str]:
    world = torch.distributed
    accelerator = deepspeed.accelerator.get_accelerator()
    assert accelerator is not None
    return (
        world.get_rank(),
        world.get_world_size(),
        os.environ["LOCAL_RANK"],
        accelerator.device_name(),
    )


def all_reduce_rank(offset: int) -> int:
    value = torch.tensor(torch.distributed.get_rank() + offset)
    torch.distributed.all_reduce(value)
    return int(value)


def fail_on_rank(rank: int) -> None:
    """Fails on one rank while the others wait for it in a collective."""
    if torch.distributed.get_rank() == rank:
        raise DataError(f"the shard of rank {rank} is broken")
    torch.distributed.barrier()


def fail_everywhere() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    raise DataError("every shard is broken")


def left_behind() -> tuple[bool, torch.dtype]:
    return "LEFT_BEHIND" in os.environ, torch.get_default_dtype()


def imported_by_the_server() -> tuple[bool, bool]:
    """Whether this rank started with modules that this file does not import, excluded from collection."""
    return "mlflow.tracking" in sys.modules, gc.get_freeze_count() > 100_000


def hang(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        time.sleep(60)


def train_linear(zero_stage: int, num_steps: int) -> list[float]:
    """Train a tiny regression under ZeRO `zero_stage`; returns losses averaged over all ranks."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": zero_stage},
        "gradient_clipping": 1.0,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    generator = torch.Generator().manual_seed(2 + torch.distributed.get_rank())
    inputs = torch.randn(4, 6, generator=generator)
    losses = []
    for _ in range(num_steps):
        loss = (engine(inputs) - inputs[:, :2].cumsum(1)).square().mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / torch.distributed.get_world_size())
    engine.destroy()
    return losses


def test_two_ranks_form_one_process_group(two_ranks: RankPool) -> None:
    assert two_ranks.run(describe_rank) == [(0, 2, "0", "cpu"), (1, 2, "1", "cpu")]


def test_one_rank_has_world_size_one(one_rank: RankPool) -> None:
    assert one_rank.run(describe_rank) == [(0, 1, "0", "cpu")]


def test_collectives_reach_all_ranks(two_ranks: RankPool) -> None:
    assert two_ranks.run(all_reduce_rank, offset=10) == [21, 21]


def test_exception_keeps_type_and_traceback(two_ranks: RankPool) -> None:
    with pytest.raises(DataError, match="every shard") as caught:
        two_ranks.run(fail_everywhere)
    assert isinstance(caught.value.__cause__, RankTracebackError)
    assert "in fail_everywhere" in str(caught.value.__cause__)
    assert two_ranks.run(left_behind) == [(False, torch.float32)] * 2


def test_zero_stages_train_identically(two_ranks: RankPool) -> None:
    losses = {
        stage: two_ranks.run(train_linear, zero_stage=stage, num_steps=5) for stage in (3, 0, 1, 2)
    }
    for per_rank in losses.values():
        assert per_rank[0] == per_rank[1]
        assert per_rank[0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[0][0][-1] < losses[0][0][0]


def test_engine_is_reproducible_on_a_reused_rank(one_rank: RankPool) -> None:
    first = one_rank.run(train_linear, zero_stage=2, num_steps=3)
    assert one_rank.run(train_linear, zero_stage=2, num_steps=3) == first


def test_pool_survives_a_hang_and_a_failure_of_one_rank() -> None:
    pool = RankPool(2)
    try:
        with pytest.raises(RankError, match=r"ranks \[1\] did not reply") as caught:
            pool.run(hang, rank=1, timeout_s=2)
        assert "in hang" in str(caught.value)
        with pytest.raises(DataError, match="the shard of rank 1"):
            pool.run(fail_on_rank, rank=1)
        assert pool.run(all_reduce_rank, offset=0) == [1, 1]
    finally:
        pool.close()


def test_ranks_are_forked_with_their_imports_and_replaced_by_other_pools() -> None:
    few = RankPool(1)
    other = RankPool(1, instead_of=(few,))
    try:
        assert few.run(imported_by_the_server) == [(True, True)]
        (pid,) = few.run(os.getpid)
        other.run(os.getpid)
        assert not Path(f"/proc/{pid}").exists()
        assert few.run(os.getpid) != [pid]
    finally:
        few.close()
        other.close()
