"""Start and end of the process group; no run leaves DeepSpeed's buffers in /dev/shm."""

import os
from typing import Any

import deepspeed
import pytest
import torch

from muomni.errors import DataError, MachineError
from muomni.training.engine import process_group as module
from muomni.training.engine.process_group import SHARED_MEMORY, process_group
from tests.ranks import RankPool

CUDA = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that start and destroy a group, which do nothing here."""
    calls: list[str] = []

    def start(dist_backend: str, timeout: Any) -> None:
        calls.append(f"start {dist_backend} {timeout.total_seconds():.0f}")

    monkeypatch.setattr(deepspeed, "init_distributed", start)
    monkeypatch.setattr(deepspeed.comm, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(module.quirks, "ignore_deprecated_collectives", lambda: None)
    return calls


def test_a_group_has_a_timeout_and_is_destroyed_at_the_end(calls: list[str]) -> None:
    with process_group(CUDA, 60):
        assert calls == ["start nccl 60"]
    assert calls == ["start nccl 60", "destroy"]


def test_after_an_error_the_group_is_not_destroyed_before_the_error_is_printed(
    calls: list[str],
) -> None:
    with pytest.raises(DataError, match="broken"), process_group(CUDA):
        raise DataError("broken")
    assert calls == ["start nccl 1800"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("The server socket has failed to listen: EADDRINUSE", "port 4711 is in use"),
        ("The client socket has timed out", r"rank 1 cannot connect .* node7:4711 \(The client"),
    ],
)
def test_ranks_that_cannot_connect_are_a_machine_error(
    failure: str, message: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    def fail(**options: object) -> None:
        raise torch.distributed.DistNetworkError(failure)

    monkeypatch.setattr(deepspeed, "init_distributed", fail)
    for name, value in {"MASTER_ADDR": "node7", "MASTER_PORT": "4711", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match=message) as caught, process_group(CUDA):
        pass
    assert caught.value.is_rank_local


def _sum_and_look() -> tuple[float, list[str]]:
    total = torch.ones(3)
    torch.distributed.all_reduce(total)
    port = os.environ["MASTER_PORT"]
    left = [path.name for path in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*")]
    return float(total.sum()), left


def test_ranks_reduce_through_unlinked_shared_memory(two_ranks: RankPool) -> None:
    assert two_ranks.run(_sum_and_look) == [(6.0, []), (6.0, [])]
