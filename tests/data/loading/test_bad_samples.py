"""The budget of bad samples: a window, distinct samples, and steps without any usable one."""

import pytest

from muomni.data.loading.bad_samples import WINDOW, BadSample, BadSampleBudget, check_split
from muomni.errors import DataError


def bad(*numbers: int) -> list[BadSample]:
    return [BadSample(f"sample {number}", f"reason {number}") for number in numbers]


def add(budget: BadSampleBudget, num_samples: int, own: list[BadSample]) -> None:
    if budget.add(num_samples, len(own), own):
        budget.check([budget.own])


def test_one_bad_sample_of_a_small_corpus_is_tolerated_in_every_epoch() -> None:
    budget = BadSampleBudget(0.01, 20)
    for _ in range(50):
        add(budget, 10, bad(3))
        add(budget, 10, [])
    assert budget.num_bad == 50 and budget.fraction == pytest.approx(1 / 20)
    add(budget, 10, bad(3))
    with pytest.raises(
        DataError, match=r"allows: sample 3 \(reason 3\); sample 4 \(reason 4\); corr"
    ):
        add(budget, 10, bad(4))


def test_the_fraction_of_the_window_is_limited() -> None:
    budget = BadSampleBudget(0.01, 10**6)
    for step in range(100):
        add(budget, 99, [])
        add(budget, 1 + 99, bad(step))
    assert budget.fraction == pytest.approx(1 / 199, rel=0.02)  # of the window
    for step in range(100, 149):
        add(budget, 2, bad(step))
    with pytest.raises(
        DataError, match=r"data\.max_bad_fraction=0\.01 allows: sample 50 .*; \.\.\.; "
    ):
        for step in range(149, 200):
            add(budget, 2, bad(step))


def test_old_samples_leave_the_window() -> None:
    budget = BadSampleBudget(0.01, 10**6)
    for _ in range(3):
        add(budget, 200, bad(*range(100)))
        for _ in range(WINDOW // 100):
            add(budget, 100, [])
    assert budget.num_bad == 300 and budget.fraction == 0 and budget.own == []


def test_steps_without_usable_samples_stop_at_once() -> None:
    with pytest.raises(
        DataError, match=r"none of the last 16 samples is usable: sample 0 .*sample 2"
    ):
        add(BadSampleBudget(0.01, 10**6), 16, bad(*range(16)))
    budget = BadSampleBudget(0.01, 10**6)
    for number in range(3):
        add(budget, 1, bad(number))
    add(budget, 1, [])
    for number in range(3, 6):
        add(budget, 1, bad(number))
    with pytest.raises(DataError, match="none of the last 4 samples is usable"):
        add(budget, 1, bad(6))


def test_zero_tolerates_nothing() -> None:
    with pytest.raises(DataError, match="max_bad_fraction=0 allows"):
        add(BadSampleBudget(0.0, 100), 10, bad(1))


def test_samples_of_all_ranks_count_once() -> None:
    """Each rank knows only its own samples; the sums are those of both."""
    first, second = BadSampleBudget(0.01, 100), BadSampleBudget(0.01, 100)
    for one, own in ((first, bad(1)), (second, bad(1))):
        assert one.add(20, 2, own)  # sums do not show that it is the same sample
    for one in (first, second):
        one.check([first.own, second.own])
    for one, own in ((first, []), (second, bad(2))):
        assert one.add(20, 1, own)
    for one in (first, second):
        with pytest.raises(DataError, match=r"2 of the last 40 samples"):
            one.check([first.own, second.own])


def test_a_split_has_the_same_budget() -> None:
    check_split(0.01, 20, bad(1), "val")
    check_split(0.01, 300, bad(1, 2, 3), "val")
    with pytest.raises(
        DataError, match=r"2 of 20 samples of split 'val' .*: sample 1 \(reason 1\); "
    ):
        check_split(0.01, 20, bad(1, 2), "val")
    with pytest.raises(DataError, match="1 of 1 samples of split 'val' are not usable"):
        check_split(0.01, 1, bad(1), "val")
