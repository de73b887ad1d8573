"""When gradients, losses or the loss scale of a run are a reason to warn, and when to stop.

A step whose gradients are not finite is passed over on all ranks, and the weights stay as they are. A few
of them are normal in fp16, whose loss scale then halves. What is decided here rests on metrics that all
ranks share, so all decide alike.
"""

import logging
import math
from collections import deque

from muomni.config.run import Fp16Section

logger = logging.getLogger(__name__)

_MAX_BAD_STEPS = 3
_MAX_NON_FINITE_LOGS = 3
_SHARE_STEPS = 100


class Guard:
    """Finds the reasons to stop a run in `precision` (bf16, fp16, fp32)."""

    def __init__(self, precision: str, fp16: Fp16Section) -> None:
        self._is_fp16 = precision == "fp16"
        self._max_bad_steps = fp16.hysteresis if self._is_fp16 else _MAX_BAD_STEPS
        self._min_scale = fp16.min_scale
        self._num_non_finite = 0
        self._last_bad_step: int | None = None

    def see_step(self, step: int, num_bad_steps: int) -> str | None:
        """Why to stop after `step`, the last of `num_bad_steps` in a row with bad gradients."""
        if num_bad_steps:
            self._last_bad_step = step
        if num_bad_steps < self._max_bad_steps:
            return None
        if self._is_fp16:
            return f"fp16 gradients overflow at the smallest loss scale, {self._min_scale:g}"
        return f"the gradients of {num_bad_steps} steps in a row are not finite"

    def see_loss(self, step: int, loss: float) -> str | None:
        """Why to stop after the logged `step`, where `loss` is the mean since the last one."""
        self._num_non_finite = 0 if math.isfinite(loss) else self._num_non_finite + 1
        if self._num_non_finite < _MAX_NON_FINITE_LOGS:
            return None
        return f"the loss of {self._num_non_finite} logged steps up to step {step} is not finite"

    def suspect(self, step: int) -> int:
        """The step to look into: the last one with bad gradients, or else `step`."""
        return self._last_bad_step or step

    @property
    def advice(self) -> str:
        """What a user can do about a run that was stopped."""
        if self._is_fp16:
            return "lower optim.lr, or train with --precision bf16 or fp32"
        return "lower optim.lr, or start over without these samples (python -m data_prep exclude)"


class ScaleWatch:
    """Warns of a loss scale that falls and of many skipped steps, once each time that it begins."""

    def __init__(self, fp16: Fp16Section) -> None:
        self._fp16 = fp16
        initial = 2.0**fp16.initial_scale_power
        self._low = min(fp16.warn_scale or 0.0, initial)
        self._warned_of_scale = self._warned_of_skips = False
        # (step, skipped steps so far) at logged steps; the first is at least _SHARE_STEPS before the last.
        self._skipped: deque[tuple[int, int]] = deque()

    def see(self, step: int, loss_scale: float, num_skipped: int) -> dict[str, float]:
        """Look at the metrics of a logged step; returns what is logged of them."""
        share = self._skipped_share(step, num_skipped)
        self._see_scale(step, loss_scale)
        self._see_share(step, share)
        metrics = {"loss_scale": loss_scale, "num_skipped": float(num_skipped)}
        if share is not None:
            metrics["skipped_fraction"] = share
        is_warning = loss_scale < self._low or self._warned_of_skips
        return {**metrics, "fp16_warning": float(is_warning)}

    def _see_scale(self, step: int, loss_scale: float) -> None:
        if loss_scale < self._low and not self._warned_of_scale:
            self._warned_of_scale = True
            logger.warning(
                "the loss scale has fallen to %g at step %d, below fp16.warn_scale=%g; at %g the run will "
                "stop: lower optim.lr or optim.max_grad_norm, or train with --precision bf16 or fp32",
                loss_scale, step, self._low, self._fp16.min_scale,
            )  # fmt: skip
        elif loss_scale >= 2 * self._low:  # one that swings about the threshold is said once
            self._warned_of_scale = False

    def _see_share(self, step: int, share: float | None) -> None:
        is_high = share is not None and share > self._fp16.warn_skipped
        if is_high and not self._warned_of_skips:
            logger.warning(
                "%.0f %% of the last steps up to step %d were skipped, more than fp16.warn_skipped=%g, for "
                "their gradients overflowed: lower optim.lr, raise fp16.scale_window, or train with "
                "--precision bf16 or fp32",
                100 * (share or 0.0), step, self._fp16.warn_skipped,
            )  # fmt: skip
        self._warned_of_skips = is_high

    def _skipped_share(self, step: int, num_skipped: int) -> float | None:
        """Share of skipped ones among the last `_SHARE_STEPS` steps or a few more; None before that many.

        The first steps are no part of it: there the scale is sought.
        """
        if step >= _SHARE_STEPS:
            self._skipped.append((step, num_skipped))
        while len(self._skipped) > 1 and self._skipped[1][0] <= step - _SHARE_STEPS:
            self._skipped.popleft()
        if not self._skipped or self._skipped[0][0] > step - _SHARE_STEPS:
            return None
        first_step, before = self._skipped[0]
        return (num_skipped - before) / (step - first_step)
