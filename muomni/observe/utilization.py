"""Model and hardware FLOPs utilization: MFU (Chowdhery et al. 2022, arXiv:2204.02311) and HFU.

MFU = model FLOP / (seconds x devices x peak). HFU counts the FLOPs that the hardware computes, including
padding and recomputed activations (Korthikanti et al. 2022, arXiv:2205.05198). Seconds exclude
validation and saving.
"""

from muomni.observe.peak_flops import Peak


class Utilization:
    """Converts FLOPs of all ranks to rates per device, and to fractions of its peak if that is known."""

    def __init__(self, num_devices: int, peak: Peak | None, why_no_peak: str) -> None:
        self.num_devices = num_devices
        self.peak = peak
        self._why_no_peak = why_no_peak
        self._first_step = 1
        self._num_steps = 0
        self._model = self._hardware = self._seconds = 0.0
        self._num_taken = 0

    def describe(self) -> str:
        """The formula with its numbers, or why there is no utilization; logged once per run."""
        if self.peak is None:
            return (
                f"not reported: {self._why_no_peak}; set training.peak_tflops to the dense "
                f"TFLOP/s of a device"
            )
        return f"model FLOP / ({self._denominator('s')}); hfu: with hardware FLOP"

    def take(
        self, step: int, num_steps: int, model: float, hardware: float, seconds: float
    ) -> dict[str, float]:
        """Metrics of the last `num_steps` steps up to `step`, from the FLOPs of all ranks and the time."""
        if self._num_taken < 2:
            # Drop the first steps from the summary: they include warm-up.
            self._first_step = step - num_steps + 1
            self._num_steps, self._model, self._hardware, self._seconds = 0, 0.0, 0.0, 0.0
        self._num_taken += 1
        self._num_steps += num_steps
        self._model += model
        self._hardware += hardware
        self._seconds += seconds
        return self._metrics(model, hardware, seconds)

    def summary(self) -> tuple[str, dict[str, float]]:
        """A sentence on all steps after the first logged ones, and its metrics; empty without steps."""
        if not self._num_steps:
            return "", {}
        model, hardware, seconds = self._model, self._hardware, self._seconds
        metrics = {
            "step_time_s": seconds / self._num_steps,
            **self._metrics(model, hardware, seconds),
        }
        text = (
            f"steps {self._first_step} to {self._first_step + self._num_steps - 1}: "
            f"{metrics['step_time_s']:.4g} s per step, {metrics['model_tflop_per_s']:.4g} model and "
            f"{metrics['hardware_tflop_per_s']:.4g} hardware TFLOP/s per device"
        )
        if self.peak is not None:
            text += (
                f"; MFU {100 * metrics['mfu']:.2f} %, HFU {100 * metrics['hfu']:.2f} %: {model:.4g} and "
                f"{hardware:.4g} FLOP / ({self._denominator(f'{seconds:.4g} s')})"
            )
        return text, metrics

    def _metrics(self, model: float, hardware: float, seconds: float) -> dict[str, float]:
        device_s = max(1e-9, seconds) * self.num_devices
        model_rate, hardware_rate = model / device_s, hardware / device_s
        metrics = {
            "model_tflop_per_s": model_rate / 1e12,
            "hardware_tflop_per_s": hardware_rate / 1e12,
        }
        if self.peak is not None:
            metrics["mfu"] = model_rate / self.peak.flop_per_s
            metrics["hfu"] = hardware_rate / self.peak.flop_per_s
        return metrics

    def _denominator(self, seconds: str) -> str:
        assert self.peak is not None
        tflops = self.peak.flop_per_s / 1e12
        return (
            f"{seconds} x {self.num_devices} devices x {tflops:g}e12 FLOP/s of {self.peak.source}"
        )
