import math

import pytest
import torch

from muomni.config.models import CodecConfig, MelConfig
from muomni.errors import NonFiniteError
from muomni.models.speech.mel import LOG_FLOOR, LogMel, mel_filters
from muomni.models.speech.vocoder import mel_to_magnitude, mel_to_waveform

CONFIG = CodecConfig().mel


def glide(num_samples: int) -> torch.Tensor:
    """A voice-like sound: harmonics of a gliding pitch, swelling and fading."""
    time = torch.arange(num_samples) / 16_000
    phase = 2 * math.pi * (120 * time + 40 * time**2)
    tone = sum(torch.sin(n * phase) / n for n in range(1, 30))
    return 0.1 * tone * (0.55 + 0.45 * torch.sin(2 * math.pi * 3 * time))


def log_mel_of(waveform: torch.Tensor, config: MelConfig = CONFIG) -> torch.Tensor:
    return LogMel(config)(waveform[None], torch.tensor([len(waveform)]))[0][0]


@pytest.mark.parametrize("config", [CONFIG, MelConfig()])
def test_speech_survives_the_round_trip(config: MelConfig) -> None:
    wanted = log_mel_of(glide(16_000), config)
    back = log_mel_of(mel_to_waveform(wanted, config), config)
    error = (back - wanted).abs().mean()
    assert error < 0.25
    assert error < 0.2 * (wanted - wanted.mean(0)).abs().mean()


def test_mel_inversion_is_nonnegative_and_exact_in_the_mel_domain() -> None:
    wanted = log_mel_of(glide(8_000))
    magnitude = mel_to_magnitude(wanted, CONFIG)
    assert (magnitude >= 0).all()
    filters = mel_filters(CONFIG, wanted.device)  # pyright: ignore[reportArgumentType]
    inverted = (magnitude @ filters).clamp(min=1e-9).log()
    assert (inverted - wanted).abs().mean() < 0.05


@pytest.mark.parametrize("num_samples", [1, 160, 161, 2_000, 16_001])
def test_duration_is_kept_within_one_frame(num_samples: int) -> None:
    log_mel = log_mel_of(glide(num_samples))
    waveform = mel_to_waveform(log_mel, CONFIG)
    assert len(waveform) == len(log_mel) * CONFIG.hop
    assert 0 <= len(waveform) - num_samples < CONFIG.hop


def test_events_keep_their_time() -> None:
    sound = torch.zeros(16_000)
    sound[9_600:11_200] = glide(1_600)
    energy = mel_to_waveform(log_mel_of(sound), CONFIG).square()
    assert energy[9_400:11_400].sum() > 0.95 * energy.sum()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_spectrogram_is_an_error(value: float) -> None:
    log_mel = log_mel_of(glide(4_000))
    log_mel[3, 5] = value
    with pytest.raises(NonFiniteError, match="1 non-finite values"):
        mel_to_waveform(log_mel, CONFIG)


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="80"):
        mel_to_waveform(torch.zeros(80, 10), CONFIG)


def test_silence_is_silent_and_empty_stays_empty() -> None:
    silence = mel_to_waveform(torch.full((50, CONFIG.num_mels), LOG_FLOOR), CONFIG)
    assert silence.abs().max() < 1e-3
    assert mel_to_waveform(torch.zeros(0, CONFIG.num_mels), CONFIG).shape == (0,)


def test_result_is_repeatable_and_keeps_the_global_random_state() -> None:
    log_mel = log_mel_of(glide(3_000))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = mel_to_waveform(log_mel, CONFIG)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(mel_to_waveform(log_mel, CONFIG), first)
    assert torch.isfinite(first).all()
