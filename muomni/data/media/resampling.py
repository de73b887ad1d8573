"""Resamples audio with torchaudio's default windowed sinc filter, for many rates faster than torchaudio.

Output samples come in periods: from 22,050 to 16,000 Hz, 320 output samples (phases) cover 441 input
samples, and each phase has its own weights. torchaudio convolves all phases over the full width of a
period, here 459 samples, of which one phase needs 20. Adjacent phases need nearly the same samples, so
here each group of phases is one matrix product over the samples it needs: the same sum without zeros.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchaudio.transforms import Resample

_PHASES_TOGETHER = 20
# Below this reduction in multiplications, many small matrix products are slower than one convolution.
_MIN_GAIN = 2.5
# Weights outside of torchaudio's window are zero up to rounding.
_ZERO_WEIGHT = 1e-20


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample float32 [num_samples, num_channels]; only the ratio of the rates matters."""
    if from_hz == to_hz:
        return samples
    channels = torch.from_numpy(np.ascontiguousarray(samples.T))
    return np.ascontiguousarray(_resampler(from_hz, to_hz)(channels).numpy().T)


@lru_cache(maxsize=32)
def _resampler(from_hz: int, to_hz: int) -> Callable[[Tensor], Tensor]:
    """Resampler of [num_channels, num_samples]; its filter is computed once per process."""
    transform = Resample(from_hz, to_hz)
    filter_ = PhasedFilter(transform)
    return filter_ if filter_.gain >= _MIN_GAIN else transform


class PhasedFilter:
    """The filter of a `Resample` between different rates, applied to groups of phases."""

    def __init__(self, transform: Resample) -> None:
        self._period_in = int(transform.orig_freq) // transform.gcd
        self._width = transform.width
        weights = transform.get_buffer("kernel")[:, 0]  # [phases, samples]
        self._num_phases = len(weights)
        needed = weights.abs() > _ZERO_WEIGHT
        self._groups: list[tuple[int, Tensor]] = []  # first sample, weights [samples, phases]
        for start in range(0, len(weights), _PHASES_TOGETHER):
            phases = slice(start, start + _PHASES_TOGETHER)
            columns = needed[phases].any(0).nonzero()
            first, last = int(columns[0]), int(columns[-1])
            self._groups.append((first, weights[phases, first : last + 1].t().contiguous()))
        num_products = sum(group.numel() for _, group in self._groups)
        self.gain = (
            weights.numel() / num_products
        )  # torchaudio's multiplications per multiplication here

    def __call__(self, channels: Tensor) -> Tensor:
        """Resample [num_channels, num_samples]."""
        num_channels, num_samples = channels.shape
        num_periods = num_samples // self._period_in + 1
        padded = pad(channels, (self._width, self._width + self._period_in))
        periods = channels.new_empty(num_channels, num_periods, self._num_phases)
        for channel, output in zip(padded, periods, strict=True):
            for number, (first, weights) in enumerate(self._groups):
                shape = (num_periods, len(weights))
                offset = channel.storage_offset() + first
                needed = channel.as_strided(shape, (self._period_in, 1), offset)
                start = number * _PHASES_TOGETHER
                output[:, start : start + weights.shape[1]] = needed @ weights
        # Round in single precision as torchaudio does, so that both give the same length.
        length = torch.ceil(torch.as_tensor(self._num_phases * num_samples / self._period_in))
        return periods.flatten(1)[:, : int(length)]
