"""The reduction of a step starts before the forward pass and is awaited after it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muomni.distributed import collectives
from muomni.training.step_reduction import StepReduction


class Work:
    """A sum over two equal ranks, available after a wait."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1
        self.tensor.mul_(2)


def test_the_sum_is_awaited_once_and_not_at_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works: list[Work] = []

    def start(tensor: torch.Tensor) -> Work:
        works.append(Work(tensor))
        return works[-1]

    monkeypatch.setattr(collectives, "start_sum_over_ranks", start)
    stage: Any = SimpleNamespace(
        terms=("text", "speech"),
        loss_denominators=lambda batch: {"text": batch["n"], "speech": torch.zeros(())},
    )
    window = StepReduction(stage, torch.device("cpu"))
    for wants_stop in (False, True):
        batches = [{"n": torch.tensor(3.0)}, {"n": torch.tensor(4.0)}]
        window.start(batches, wants_stop)
        assert works[-1].num_waits == 0
        for _ in batches:
            weights = {term: float(weight) for term, weight in window.denominators().items()}
            assert weights == {"text": 14.0, "speech": 0.0}
        assert works[-1].num_waits == 1
        assert window.stop_agreed() == wants_stop
