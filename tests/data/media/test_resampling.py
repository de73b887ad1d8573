"""Resampling equals torchaudio, with either implementation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.transforms import Resample

from muomni.data.media.resampling import PhasedFilter, resample

RATES_HZ = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)


@settings(max_examples=60, deadline=None)
@given(
    from_hz=st.sampled_from(RATES_HZ),
    to_hz=st.sampled_from(RATES_HZ),
    num_samples=st.integers(1, 5_000),
    num_channels=st.integers(1, 3),
)
def test_resampling_equals_torchaudio(
    from_hz: int, to_hz: int, num_samples: int, num_channels: int
) -> None:
    random = np.random.default_rng(num_samples)
    samples = random.uniform(-1, 1, (num_samples, num_channels)).astype(np.float32)
    expected = Resample(from_hz, to_hz)(torch.from_numpy(samples.T.copy())).numpy().T
    resampled = resample(samples, from_hz, to_hz)
    assert resampled.dtype == np.float32 and resampled.shape == expected.shape
    np.testing.assert_allclose(resampled, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(22_050, 16_000), (44_100, 16_000), (16_000, 22_050), (8_000, 11_025)]
)
def test_rates_with_many_phases_need_fewer_multiplications(from_hz: int, to_hz: int) -> None:
    assert PhasedFilter(Resample(from_hz, to_hz)).gain > 5


def test_length_of_long_audio_equals_torchaudio() -> None:
    """Both round in single precision, which cannot represent every length."""
    transform = Resample(16_000, 22_050)
    for num_samples in (160_001, 1_000_003, 12_345_677):
        waveform = torch.zeros(1, num_samples)
        assert PhasedFilter(transform)(waveform).shape == transform(waveform).shape
