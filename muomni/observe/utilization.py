"""How much of the devices' peak a run uses: MFU and HFU (Chowdhery et al. 2022, arXiv:2204.02311).

MFU = model FLOP / (seconds x devices x peak), HFU = the same with the FLOPs that the hardware computed,
padding and recomputed activations included (Korthikanti et al. 2022, arXiv:2205.05198). Seconds are
those of training: validation and saving are left out.
"""

from muomni.observe.peak_flops import Peak


class Utilisation:
    """Turns FLOPs of all ranks into rates of one device, and into shares of its peak if that is known."""

    def __init__(self, num_devices: int, peak: Peak | None, why_no_peak: str) -> None:
        self.num_devices = num_devices
        self.peak = peak
        self._why_no_peak = why_no_peak
        self._first_step = 1
        self._sums = (0, 0.0, 0.0, 0.0)
        self._num_taken = 0

    def describe(self) -> str:
        """The formula with its numbers, or why there is no utilization; printed once a run."""
        if self.peak is None:
            return (
                f"has no mfu and hfu, since {self._why_no_peak}; training.peak_tflops gives one "
                f"(dense TFLOP/s of a device)"
            )
        return f"mfu = model FLOP / ({self._denominator('s')}); hfu: hardware FLOP in its place"

    def take(
        self, step: int, num_steps: int, model: float, hardware: float, seconds: float
    ) -> dict[str, float]:
        """Metrics of the last `num_steps` up to `step`, given FLOPs of all ranks and the time."""
        if self._num_taken < 2:
            # What starts up in the first steps is no measure of those after them.
            self._first_step = step - num_steps + 1
            self._sums = (0, 0.0, 0.0, 0.0)
        self._num_taken += 1
        count, models, hardwares, times = self._sums
        self._sums = (count + num_steps, models + model, hardwares + hardware, times + seconds)
        return self._metrics(model, hardware, seconds)

    def summary(self) -> tuple[str, dict[str, float]]:
        """One sentence on all steps since the first logged ones, and its metrics; none: no steps."""
        num_steps, model, hardware, seconds = self._sums
        if not num_steps:
            return "", {}
        metrics = {"step_time_s": seconds / num_steps, **self._metrics(model, hardware, seconds)}
        text = (
            f"steps {self._first_step} to {self._first_step + num_steps - 1}: "
            f"{metrics['step_time_s']:.4g} s a step, {metrics['model_tflop_per_s']:.4g} model and "
            f"{metrics['hardware_tflop_per_s']:.4g} hardware TFLOP/s a device"
        )
        if self.peak is not None:
            text += (
                f"; MFU {100 * metrics['mfu']:.2f} %, HFU {100 * metrics['hfu']:.2f} %: {model:.4g} and "
                f"{hardware:.4g} FLOP / ({self._denominator(f'{seconds:.4g} s')})"
            )
        return text, metrics

    def _metrics(self, model: float, hardware: float, seconds: float) -> dict[str, float]:
        device_s = max(1e-9, seconds) * self.num_devices
        metrics = {
            "model_tflop_per_s": model / device_s / 1e12,
            "hardware_tflop_per_s": hardware / device_s / 1e12,
        }
        if self.peak is not None:
            metrics["mfu"] = model / device_s / self.peak.flop_per_s
            metrics["hfu"] = hardware / device_s / self.peak.flop_per_s
        return metrics

    def _denominator(self, seconds: str) -> str:
        assert self.peak is not None
        tflops = self.peak.flop_per_s / 1e12
        return (
            f"{seconds} x {self.num_devices} devices x {tflops:g}e12 FLOP/s of {self.peak.source}"
        )
