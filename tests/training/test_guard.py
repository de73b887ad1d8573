"""Signals that stop a run, when it stops by itself, and when it warns of its loss scale."""

import logging
import os
import signal

import pytest

from muomni.config.run import Fp16Section
from muomni.training.guard import Guard, ScaleWatch, StopFlag

INF = float("inf")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name
)
def test_a_signal_is_remembered_and_its_handler_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag().installed() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal_name == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_three_consecutive_bad_steps_stop_the_run(precision: str) -> None:
    guard = Guard(precision, Fp16Section(hysteresis=7))
    assert [guard.check_gradients(step, num) for step, num in ((4, 1), (5, 2), (6, 0), (7, 1))] == [
        None
    ] * 4
    assert guard.suspect(9) == 7
    assert guard.check_gradients(9, 3) == "the gradients of 3 consecutive steps are non-finite"
    assert "exclude" in guard.advice


def test_fp16_stops_when_the_scale_cannot_fall() -> None:
    guard = Guard("fp16", Fp16Section(hysteresis=2, min_scale=4))
    assert guard.check_gradients(3, 1) is None
    assert guard.check_gradients(4, 2) == "fp16 gradients overflow at the smallest loss scale, 4"


def test_three_consecutive_non_finite_logged_losses_stop_the_run() -> None:
    guard = Guard("fp32", Fp16Section())
    assert [guard.check_loss(step, loss) for step, loss in ((10, INF), (20, INF), (30, 2.0))] == [
        None
    ] * 3
    assert [guard.check_loss(step, INF) for step in (40, 50)] == [None] * 2
    assert (
        guard.check_loss(60, float("nan"))
        == "the loss of 3 logged steps up to step 60 is non-finite"
    )
    assert guard.suspect(60) == 60  # no step with bad gradients is known


def test_a_low_scale_warns_once_until_it_has_recovered(caplog: pytest.LogCaptureFixture) -> None:
    watch = ScaleWatch(Fp16Section(initial_scale_power=8, warn_scale=32))
    scales = [256, 64, 32, 16, 8, 16, 32, 16, 64, 16]
    with caplog.at_level(logging.WARNING):
        metrics = [watch.check(10 * step, float(scale), 0) for step, scale in enumerate(scales)]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert "fell to 16 at step 30, below fp16.warn_scale=32; the run stops at 1" in warned[0]
    assert "at step 90" in warned[1]
    marks = [metric["fp16_warning"] for metric in metrics]
    assert marks == [float(scale < 32) for scale in scales]


@pytest.mark.parametrize(
    "fp16", [{"warn_scale": None}, {"warn_scale": 32, "initial_scale_power": 3}]
)
def test_no_warning_for_a_low_initial_scale_or_without_a_threshold(
    fp16: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    watch = ScaleWatch(Fp16Section.model_validate(fp16))
    with caplog.at_level(logging.WARNING):
        watch.check(10, 8.0, 1)
    assert not caplog.records


def test_many_skipped_steps_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = ScaleWatch(Fp16Section(warn_skipped=0.1))
    # Sixteen while the scale adapts, then one in five from step 200 to 400.
    skipped = [(step, 16 + max(0, min(step, 400) - 200) // 5) for step in range(10, 700, 10)]
    with caplog.at_level(logging.WARNING):
        metrics = {step: watch.check(step, 1024.0, num) for step, num in skipped}
    assert len(caplog.records) == 1
    assert "overflowed in 12 % of the last steps up to step 260" in caplog.records[0].getMessage()
    assert "skipped_fraction" not in metrics[190]
    assert metrics[200]["skipped_fraction"] == 0
    assert metrics[300]["skipped_fraction"] == pytest.approx(0.2)
    assert [step for step, seen in metrics.items() if seen["fp16_warning"]] == list(
        range(260, 450, 10)
    )
