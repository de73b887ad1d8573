"""Audio clips at another rate: torchaudio's windowed sinc with its default filter, often faster.

Output samples come in periods: from 22,050 to 16,000 Hz each 320 of them stand over 441 input samples, and
each has weights of its own (a phase). torchaudio convolves all phases over the whole width of a period,
459 samples here, of which a phase needs 20. Neighboring phases need nearly the same samples, so here a
few phases at a time are one matrix product over what they need: the same sum without its zeros.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchaudio.transforms import Resample

_PHASES_TOGETHER = 20
# Fewer multiplications by this factor outweigh that matrix products are many and small.
_LEAST_GAIN = 2.5
# What torchaudio's window leaves of weights beyond its ends, which are zero but for rounding.
_NOTHING = 1e-20


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Float32 [num_samples, num_channels] at another rate; only the ratio of the two counts."""
    if from_hz == to_hz:
        return samples
    channels = torch.from_numpy(np.ascontiguousarray(samples.T))
    return np.ascontiguousarray(_resampler(from_hz, to_hz)(channels).numpy().T)


@lru_cache(maxsize=32)
def _resampler(from_hz: int, to_hz: int) -> Callable[[Tensor], Tensor]:
    """What turns [num_channels, num_samples] into the other rate; its filter is computed once a process."""
    transform = Resample(from_hz, to_hz)
    filter_ = PhasedFilter(transform)
    return filter_ if filter_.gain >= _LEAST_GAIN else transform


class PhasedFilter:
    """The filter of a `Resample` between two different rates, a few phases at a time."""

    def __init__(self, transform: Resample) -> None:
        self._period_in = int(transform.orig_freq) // transform.gcd
        self._width = transform.width
        weights = transform.get_buffer("kernel")[:, 0]  # [phases, samples]
        self._num_phases = len(weights)
        needed = weights.abs() > _NOTHING
        self._groups: list[tuple[int, Tensor]] = []  # first sample, weights [samples, phases]
        for start in range(0, len(weights), _PHASES_TOGETHER):
            phases = slice(start, start + _PHASES_TOGETHER)
            places = needed[phases].any(0).nonzero()
            first, last = int(places[0]), int(places[-1])
            self._groups.append((first, weights[phases, first : last + 1].t().contiguous()))
        num_products = sum(group.numel() for _, group in self._groups)
        self.gain = weights.numel() / num_products  # multiplications of torchaudio for each of ours

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
        # As torchaudio rounds, in single precision: lengths must not depend on which of the two it was.
        length = torch.ceil(torch.as_tensor(self._num_phases * num_samples / self._period_in))
        return periods.flatten(1)[:, : int(length)]
