"""The progress line: one line a logged step, with everything an operator looks for."""

import time


class Progress:
    """Rates and remaining time, measured from the first logged step after a start or resume."""

    def __init__(self, stage: str, unit: str, start_step: int, num_steps: int) -> None:
        self.stage = stage
        self.unit = unit
        self.num_steps = num_steps
        self._start = self._last = time.perf_counter()
        self._start_step = self._last_step = start_step
        self._paused_s = self._paused_last_s = 0.0
        self._last_wait_s = 0.0
        self.busy_s = 0.0  # of the steps that `rates` was last asked about
        self.num_busy_steps = 0

    def pause(self, seconds: float) -> None:
        """Leave time spent in validation and saving out of the rates."""
        self._paused_s += seconds

    def rates(self, step: int, units: float, wait_s: float) -> dict[str, float]:
        """Metrics since the last call: step time, units a second over all ranks, data wait."""
        now = time.perf_counter()
        busy = max(1e-9, now - self._last - (self._paused_s - self._paused_last_s))
        steps = max(1, step - self._last_step)
        self.busy_s, self.num_busy_steps = busy, steps
        metrics = {
            "step_time_s": busy / steps,
            f"{self.unit}_per_s": units / busy,
            "data_wait_fraction": min(1.0, max(0.0, wait_s - self._last_wait_s) / busy),
        }
        self._last, self._last_step, self._last_wait_s = now, step, wait_s
        self._paused_last_s = self._paused_s
        return metrics

    def eta_s(self, step: int) -> float:
        done = step - self._start_step
        per_step = (time.perf_counter() - self._start) / max(1, done)
        return per_step * (self.num_steps - step)

    def line(self, step: int, metrics: dict[str, float]) -> str:
        parts = [
            f"{self.stage} {step}/{self.num_steps}",
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['lr']:.2e}",
            f"grad {metrics['grad_norm']:.2f}",
            f"{metrics[f'{self.unit}_per_s']:,.0f} {self.unit}/s",
            f"wait {100 * metrics['data_wait_fraction']:.0f} %",
            f"eta {duration(self.eta_s(step))}",
        ]
        if "mfu" in metrics:
            parts.insert(5, f"MFU {100 * metrics['mfu']:.1f} %")
        if "loss_scale" in metrics:
            mark = "!" if metrics.get("fp16_warning") else ""
            skipped = f"skipped {metrics['num_skipped']:.0f}"
            parts.insert(4, f"scale {metrics['loss_scale']:g}{mark} {skipped}")
        if "moe/max_load" in metrics:
            load, even, dead = (
                metrics[f"moe/{name}"] for name in ("max_load", "entropy", "num_dead")
            )
            parts.insert(4, f"experts max {load:.1f}x entropy {even:.2f} dead {dead:.0f}")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """`75` as `1:15`, an hour and more as `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
