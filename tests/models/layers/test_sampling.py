"""Sampling follows the requested distribution."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muomni.models.layers.sampling import LoopDetector, sample

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def frequencies(**settings: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sampled = sample(LOGITS.expand(8000, 4), generator=generator, **settings)
    return torch.bincount(sampled, minlength=4) / 8000


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
    ],
)
def test_frequencies_follow_the_settings(settings: dict, expected: list[float]) -> None:
    torch.testing.assert_close(
        frequencies(**settings), torch.tensor(expected, dtype=torch.float32), atol=0.02, rtol=0
    )


@given(
    start=st.lists(st.integers(0, 3), max_size=12),
    cycle=st.lists(st.integers(10, 99), min_size=1, max_size=24, unique=True),
)
def test_a_loop_is_detected_after_enough_repetitions(start: list[int], cycle: list[int]) -> None:
    """A second sequence counts up and never loops."""
    detector = LoopDetector(2, torch.device("cpu"))
    wanted = max(2 * len(cycle), LoopDetector.MIN_REPEATED)
    said = start + cycle * (1 + -(-wanted // len(cycle)))
    for number, token in enumerate(said, start=1):
        looping, counting = detector.num_repeated(torch.tensor([[token], [1000 + number]])).tolist()
        num_repeated = number - len(start) - len(cycle)
        if number > len(start):
            assert looping == (num_repeated if num_repeated >= wanted else 0)
        assert counting == 0


def test_shape_is_kept() -> None:
    assert sample(torch.randn(2, 3, 7)).shape == (2, 3)


def test_settings_out_of_range_are_rejected() -> None:
    with pytest.raises(ValueError, match="top_p=0"):
        sample(LOGITS, top_p=0)
