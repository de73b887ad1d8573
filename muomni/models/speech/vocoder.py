"""Log-mel spectrogram to waveform without training: mel inversion, then fast Griffin-Lim.

Non-negative least squares (multiplicative updates of Lee and Seung, 2001) inverts the mel filters, which
gives a better mel spectrogram than a clamped pseudo-inverse. Phases come from torchaudio's Griffin-Lim
with momentum (Perraudin et al., 2013). T frames give exactly T * hop samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from muomni.config.models import MelConfig
from muomni.errors import NonFiniteError
from muomni.models.speech.mel import MAGNITUDE_FLOOR, hann_window, mel_filters

NUM_INVERSION_STEPS = 50
NUM_PHASE_STEPS = 64
MOMENTUM = 0.99


def mel_to_magnitude(log_mel: Tensor, config: MelConfig) -> Tensor:
    """Return STFT magnitudes [T, num_fft // 2 + 1] with the mel spectrogram `log_mel` [T, M]."""
    filters = mel_filters(config, log_mel.device)  # pyright: ignore[reportArgumentType]
    target = log_mel.float().exp() @ filters.T
    gram = filters @ filters.T
    magnitude = target
    for _ in range(NUM_INVERSION_STEPS):
        magnitude = magnitude * target / (magnitude @ gram).clamp(min=torch.finfo().tiny)
    return magnitude


@torch.no_grad()
def mel_to_waveform(log_mel: Tensor, config: MelConfig, seed: int = 0) -> Tensor:
    """Return 16 kHz speech [T * hop] fp32 for a natural-log mel spectrogram [T, num_mels].

    Deterministic; `seed` sets the initial phases. Raises NonFiniteError for NaN or infinite values,
    ValueError for another shape.
    """
    from torchaudio.functional import griffinlim

    if log_mel.ndim != 2 or log_mel.shape[1] != config.num_mels:
        shape = tuple(log_mel.shape)
        raise ValueError(f"the vocoder expects [frames, {config.num_mels}], got {shape}")
    num_bad = int((~torch.isfinite(log_mel)).sum())
    if num_bad:
        raise NonFiniteError(
            f"the mel spectrogram for the vocoder has {num_bad} non-finite values out of "
            f"{log_mel.numel()}; use an earlier checkpoint of the model that generated it"
        )
    num_frames = len(log_mel)
    if num_frames == 0:
        return log_mel.new_zeros(0, dtype=torch.float32)
    magnitude = mel_to_magnitude(log_mel, config).T
    # Trailing silence for the last window, and for the minimum length of Griffin-Lim.
    num_extra = 2 * config.num_fft // config.hop
    magnitude = F.pad(magnitude, (0, num_extra), value=MAGNITUDE_FLOOR)
    device = log_mel.device
    is_cuda = device.type == "cuda"
    # torchaudio samples from the global generator of the device; fork and seed only that one.
    with (
        torch.random.fork_rng(devices=[device] if is_cuda else []),
        torch.autocast(device.type, enabled=False),
    ):
        generators = torch.cuda.default_generators if is_cuda else (torch.default_generator,)
        generators[device.index or 0].manual_seed(seed)
        waveform = griffinlim(
            magnitude,
            window=hann_window(config.num_fft, device),
            n_fft=config.num_fft,
            hop_length=config.hop,
            win_length=config.num_fft,
            power=1.0,
            n_iter=NUM_PHASE_STEPS,
            momentum=MOMENTUM,
            length=(num_frames + num_extra - 1) * config.hop,
            rand_init=True,
        )
    return waveform[: num_frames * config.hop]
