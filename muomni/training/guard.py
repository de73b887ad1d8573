"""Reasons to stop a run, and to warn: signals, non-finite gradients and losses, and the fp16 loss scale.

A step with non-finite gradients is skipped on all ranks, and the weights stay unchanged. A few such steps are
normal in fp16, which then halves the loss scale. Decisions depend only on metrics that all ranks share, so
all ranks decide alike.
"""

import logging
import math
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from muomni.config.run import Fp16Section
from muomni.distributed.launcher import stop_signals

logger = logging.getLogger(__name__)

_MAX_BAD_STEPS = 3
_MAX_NON_FINITE_LOGS = 3
_NUM_SKIP_STEPS = 100


class StopFlag:
    """Remembers the first signal that asked this rank to stop.

    A launcher may reach one rank long before the others (DeepSpeed's signals them one by one), so a rank
    never acts on its own flag: `StepReduction` carries it to all ranks.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self.signal_name = signal.Signals(number).name

    @contextmanager
    def installed(self) -> Iterator["StopFlag"]:
        """Handle the signals inside the block; restores the previous handlers."""
        before = {number: signal.signal(number, self._set) for number in stop_signals()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Guard:
    """Decides when to stop a run in `precision` (bf16, fp16, fp32)."""

    def __init__(self, precision: str, fp16: Fp16Section) -> None:
        self._is_fp16 = precision == "fp16"
        self._max_bad_steps = fp16.hysteresis if self._is_fp16 else _MAX_BAD_STEPS
        self._min_scale = fp16.min_scale
        self._num_non_finite = 0
        self._last_bad_step: int | None = None

    def check_gradients(self, step: int, num_bad_steps: int) -> str | None:
        """Reason to stop after `step`, the last of `num_bad_steps` consecutive steps with bad gradients."""
        if num_bad_steps:
            self._last_bad_step = step
        if num_bad_steps < self._max_bad_steps:
            return None
        if self._is_fp16:
            return f"fp16 gradients overflow at the smallest loss scale, {self._min_scale:g}"
        return f"the gradients of {num_bad_steps} consecutive steps are non-finite"

    def check_loss(self, step: int, loss: float) -> str | None:
        """Reason to stop after the logged `step`, where `loss` is the mean since the last one."""
        self._num_non_finite = 0 if math.isfinite(loss) else self._num_non_finite + 1
        if self._num_non_finite < _MAX_NON_FINITE_LOGS:
            return None
        return f"the loss of {self._num_non_finite} logged steps up to step {step} is non-finite"

    def suspect(self, step: int) -> int:
        """The step to diagnose: the last one with bad gradients, else `step`."""
        return self._last_bad_step or step

    @property
    def advice(self) -> str:
        """What to try after the run has stopped."""
        if self._is_fp16:
            return "lower optim.lr, or train with --precision bf16 or fp32"
        return "lower optim.lr, or start over without these samples (python -m data_prep exclude)"


class ScaleWatch:
    """Warns when the loss scale is low or many steps are skipped, once per occurrence."""

    def __init__(self, fp16: Fp16Section) -> None:
        self._fp16 = fp16
        initial = 2.0**fp16.initial_scale_power
        self._low = min(fp16.warn_scale or 0.0, initial)
        self._warned_scale = self._warned_skips = False
        # (step, skipped steps so far) at logged steps; the first is at least _NUM_SKIP_STEPS before the last.
        self._skipped: deque[tuple[int, int]] = deque()

    def check(self, step: int, loss_scale: float, num_skipped: int) -> dict[str, float]:
        """Check a logged step; returns its metrics."""
        fraction = self._skipped_fraction(step, num_skipped)
        self._check_scale(step, loss_scale)
        self._check_fraction(step, fraction)
        metrics = {"loss_scale": loss_scale, "num_skipped": float(num_skipped)}
        if fraction is not None:
            metrics["skipped_fraction"] = fraction
        is_warning = loss_scale < self._low or self._warned_skips
        return {**metrics, "fp16_warning": float(is_warning)}

    def _check_scale(self, step: int, loss_scale: float) -> None:
        if loss_scale < self._low and not self._warned_scale:
            self._warned_scale = True
            logger.warning(
                "the loss scale fell to %g at step %d, below fp16.warn_scale=%g; the run stops at %g: lower "
                "optim.lr or optim.max_grad_norm, or train with --precision bf16 or fp32",
                loss_scale, step, self._low, self._fp16.min_scale,
            )  # fmt: skip
        elif loss_scale >= 2 * self._low:  # hysteresis: a scale around the threshold warns once
            self._warned_scale = False

    def _check_fraction(self, step: int, fraction: float | None) -> None:
        is_high = fraction is not None and fraction > self._fp16.warn_skipped
        if is_high and not self._warned_skips:
            logger.warning(
                "gradients overflowed in %.0f %% of the last steps up to step %d, more than "
                "fp16.warn_skipped=%g, so these steps were skipped: lower optim.lr, raise fp16.scale_window, "
                "or train with --precision bf16 or fp32",
                100 * (fraction or 0.0), step, self._fp16.warn_skipped,
            )  # fmt: skip
        self._warned_skips = is_high

    def _skipped_fraction(self, step: int, num_skipped: int) -> float | None:
        """Fraction of skipped steps among the last `_NUM_SKIP_STEPS` or a few more; None before that.

        The first steps do not count, since the loss scale still adapts.
        """
        if step >= _NUM_SKIP_STEPS:
            self._skipped.append((step, num_skipped))
        while len(self._skipped) > 1 and self._skipped[1][0] <= step - _NUM_SKIP_STEPS:
            self._skipped.popleft()
        if not self._skipped or self._skipped[0][0] > step - _NUM_SKIP_STEPS:
            return None
        first_step, before = self._skipped[0]
        return (num_skipped - before) / (step - first_step)
