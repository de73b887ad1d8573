import math

import pytest
import torch

from muomni.config.models import MelConfig
from muomni.models.speech.mel import (
    LOG_FLOOR,
    LogMel,
    denormalize_fixed,
    mel_filters,
    normalize_fixed,
    normalize_per_utterance,
)

CONFIG = MelConfig()


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise audio clips of these lengths; the padding holds large values that must not matter."""
    generator = torch.Generator().manual_seed(0)
    waveform = torch.full((len(lengths), max(lengths)), 7.0)
    for row, length in zip(waveform, lengths, strict=True):
        row[:length] = 0.1 * torch.randn(length, generator=generator)
    return waveform, torch.tensor(lengths)


def test_number_of_frames_is_rounded_up() -> None:
    waveform, lengths = padded([16_000, 15_999, 161, 160, 1])
    log_mel, frame_lengths = LogMel(CONFIG)(waveform, lengths)
    assert log_mel.shape == (5, 100, CONFIG.num_mels)
    assert frame_lengths.tolist() == [100, 100, 2, 1, 1]


@pytest.mark.parametrize("config", [CONFIG, MelConfig(num_fft=1024, min_hz=0.0, max_hz=8000.0)])
def test_padded_batch_equals_single_audio_clips(config: MelConfig) -> None:
    waveform, lengths = padded([8_000, 3_217, 700, 5])
    module = LogMel(config)
    batch, frame_lengths = module(waveform, lengths)
    normal = normalize_per_utterance(batch, frame_lengths)
    for i, length in enumerate(lengths.tolist()):
        single, single_length = module(waveform[i : i + 1, :length], lengths[i : i + 1])
        frames = int(single_length)
        assert int(frame_lengths[i]) == frames
        torch.testing.assert_close(batch[i, :frames], single[0], rtol=0, atol=1e-4)
        assert (batch[i, frames:] == LOG_FLOOR).all()
        own = normalize_per_utterance(single, single_length)[0]
        torch.testing.assert_close(normal[i, :frames], own, rtol=0, atol=1e-3)
        assert (normal[i, frames:] == 0).all()


def test_a_tone_peaks_in_the_channel_of_its_frequency() -> None:
    time = torch.arange(16_000) / 16_000
    tone = 0.5 * torch.sin(2 * math.pi * 1_000 * time)[None]
    log_mel, _ = LogMel(CONFIG)(tone, torch.tensor([16_000]))
    channel = int(log_mel[0, 50].argmax())
    # On Slaney's scale 1000 Hz is mel 15 and 20 Hz is 0.3; 7600 Hz is 44.5.
    top = 15 + math.log(7.6) / (math.log(6.4) / 27)
    expected = (15 - 0.3) / ((top - 0.3) / (CONFIG.num_mels + 1)) - 1
    assert abs(channel - expected) <= 1


def test_no_filter_is_empty() -> None:
    assert (mel_filters(CONFIG, torch.device("cpu")).sum(0) > 0).all()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_model_changes_nothing(dtype: torch.dtype) -> None:
    waveform, lengths = padded([4_000, 2_000])
    reference, _ = LogMel(CONFIG)(waveform, lengths)
    cast, _ = LogMel(CONFIG).to(dtype)(waveform, lengths)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, reference)


def test_utterance_normalization_removes_gain() -> None:
    waveform, lengths = padded([8_000, 3_000])
    module = LogMel(CONFIG)
    loud = normalize_per_utterance(*module(waveform, lengths))
    quiet = normalize_per_utterance(*module(waveform * 0.1, lengths))
    torch.testing.assert_close(loud, quiet, rtol=0, atol=1e-3)
    assert loud[0].mean(0).abs().max() < 1e-4
    assert (loud[0].std(0, correction=0) - 1).abs().max() < 0.1


def test_silence_and_empty_audio_clips_stay_finite() -> None:
    lengths = torch.tensor([1_600, 0])
    log_mel, frame_lengths = LogMel(CONFIG)(torch.zeros(2, 1_600), lengths)
    assert frame_lengths.tolist() == [10, 0]
    normal = normalize_per_utterance(log_mel, frame_lengths)
    assert torch.equal(normal, torch.zeros_like(normal))


def test_fixed_normalization_is_invertible() -> None:
    log_mel, frame_lengths = LogMel(CONFIG)(*padded([8_000, 3_000]))
    back = denormalize_fixed(normalize_fixed(log_mel, frame_lengths))
    torch.testing.assert_close(back[0], log_mel[0])


def test_flops_count_the_filter_bank() -> None:
    assert LogMel(CONFIG).flops().forward == 2 * 257 * 80
