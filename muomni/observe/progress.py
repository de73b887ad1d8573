"""Progress: rates of training, and the line that is printed at each logged step."""

import time
from pathlib import Path

from muomni.observe.recorder import Kind, RunInfo, Status


class StepRates:
    """Step time and throughput since the last logged step, without pauses."""

    def __init__(self, unit: str, step: int) -> None:
        self.unit = unit
        self.busy_s = 0.0  # duration of the steps in the last call of `take`
        self.num_busy_steps = 0
        self._last_wait_s = 0.0
        self.start(step)

    def start(self, step: int) -> None:
        """Measure from now on, after `step` finished steps."""
        self._last_s, self._last_step = time.perf_counter(), step
        self._paused_s = 0.0

    def pause(self, seconds: float) -> None:
        """Exclude time that was spent on validation or saving."""
        self._paused_s += seconds

    def take(self, step: int, units: float, wait_s: float) -> dict[str, float]:
        """Metrics since the last call: step time, units per second over all ranks, data wait."""
        now = time.perf_counter()
        busy = max(1e-9, now - self._last_s - self._paused_s)
        steps = max(1, step - self._last_step)
        self.busy_s, self.num_busy_steps = busy, steps
        waited = wait_s - self._last_wait_s
        self._last_s, self._last_step, self._last_wait_s, self._paused_s = now, step, wait_s, 0.0
        return {
            "step_time_s": busy / steps,
            f"{self.unit}_per_s": units / busy,
            "data_wait_fraction": min(1.0, max(0.0, waited) / busy),
        }


class ProgressLine:
    """Recorder that prints one line per logged step and per validation."""

    _info: RunInfo
    _start_s: float

    def open(self, info: RunInfo) -> None:
        self._info = info
        self._start_s = time.perf_counter()

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        if kind == "train":
            print(self.line(step, metrics), flush=True)
        else:
            text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"{self._info.stage} {step}/{self._info.num_steps}  {text}", flush=True)

    def artifact(self, path: Path, folder: str) -> None:
        """Ignored."""

    def close(self, status: Status) -> None:
        """Nothing to flush."""

    def line(self, step: int, metrics: dict[str, float]) -> str:
        info = self._info
        parts = [
            f"{info.stage} {step}/{info.num_steps}",
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['lr']:.2e}",
            f"grad {metrics['grad_norm']:.2f}",
            f"{metrics[f'{info.unit}_per_s']:,.0f} {info.unit}/s",
            f"wait {100 * metrics['data_wait_fraction']:.0f} %",
            f"eta {duration(self._eta_s(step))}",
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

    def _eta_s(self, step: int) -> float:
        per_step = (time.perf_counter() - self._start_s) / max(1, step - self._info.step)
        return per_step * (self._info.num_steps - step)


def duration(seconds: float) -> str:
    """`75` as `1:15`, an hour and more as `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
