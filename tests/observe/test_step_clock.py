"""Sections of a step cover all its time, by a CPU's clock and by a GPU's events."""

import time
from typing import Any

import pytest
import torch

from muomni.observe import step_clock
from muomni.observe.step_clock import StepClock, step_breakdown


def test_time_belongs_to_the_section_marked_last() -> None:
    start = time.perf_counter()
    clock = StepClock(torch.device("cpu"))
    clock.mark("data_wait")
    time.sleep(0.02)
    clock.mark("backward")
    time.sleep(0.01)
    with clock.section("communication"):
        time.sleep(0.03)
    time.sleep(0.01)
    seconds = clock.take()
    elapsed = time.perf_counter() - start
    assert seconds["data_wait"] >= 0.02
    assert seconds["backward"] >= 0.02
    assert 0.03 <= seconds["communication"] < elapsed - 0.04
    assert sum(seconds.values()) == pytest.approx(elapsed, abs=0.01)


def test_take_splits_the_current_section() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.mark("forward")
    clock.take()
    time.sleep(0.01)
    assert clock.take().keys() == {"forward"}


class Event:
    """A CUDA event that the device reaches `elapsed_ms` after the previous one."""

    elapsed_ms = 5.0
    num_made = 0
    waits: list[int]

    def __init__(self) -> None:
        self.number = Event.num_made
        Event.num_made += 1

    def synchronize(self) -> None:
        Event.waits.append(self.number)

    def elapsed_time(self, other: "Event") -> float:
        return self.elapsed_ms * (other.number - self.number)


@pytest.fixture()
def gpu_clock(monkeypatch: pytest.MonkeyPatch) -> StepClock:
    Event.num_made, Event.waits = 0, []
    monkeypatch.setattr(step_clock, "_event", Event)
    return StepClock(torch.device("cuda"))


def test_only_take_waits_for_events(gpu_clock: StepClock) -> None:
    for _ in range(10):
        gpu_clock.mark("forward")
        gpu_clock.mark("backward")
    assert Event.waits == []
    seconds = gpu_clock.take()
    assert Event.waits == [21]
    assert seconds == pytest.approx({"other": 0.005, "forward": 0.05, "backward": 0.05})


def test_unread_events_are_bounded(gpu_clock: StepClock) -> None:
    for _ in range(10_000):
        gpu_clock.mark("forward")
    unread: Any = gpu_clock._unread
    assert len(unread) <= step_clock._MAX_UNREAD
    assert max(Event.waits) < 10_000 - 2_000  # only old ones
    assert sum(gpu_clock.take().values()) == pytest.approx(10_001 * 0.005)


def test_metrics_are_seconds_per_step_and_percent_of_the_total() -> None:
    metrics = step_breakdown({"forward": 3.0, "save": 1.0}, num_steps=10)
    assert metrics == {
        "time/forward_s": 0.3, "time/forward_percent": 75.0,
        "time/save_s": 0.1, "time/save_percent": 25.0,
    }  # fmt: skip
