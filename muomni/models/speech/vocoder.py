"""Log-mel spectrogram to waveform without training: mel inversion, then fast Griffin-Lim.

The mel filters are undone by non-negative least squares (multiplicative updates of Lee and Seung,
2001), which beats a clamped pseudo-inverse on the mel spectrogram of the result. Phases come from
Griffin-Lim with momentum (Perraudin et al., 2013), in torchaudio. A spectrogram of T frames gives
exactly T * hop samples, so speech keeps its duration.
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
    """Return STFT magnitudes [T, num_fft // 2 + 1] whose mel spectrogram is `log_mel` [T, M]."""
    filters = mel_filters(config, log_mel.device)  # pyright: ignore[reportArgumentType]
    target = log_mel.float().exp() @ filters.T
    gram = filters @ filters.T
    magnitude = target
    for _ in range(NUM_INVERSION_STEPS):
        magnitude = magnitude * target / (magnitude @ gram).clamp(min=torch.finfo().tiny)
    return magnitude


@torch.no_grad()
def mel_to_waveform(log_mel: Tensor, config: MelConfig, seed: int = 0) -> Tensor:
    """Return 16 kHz speech [T * hop], fp32, for a natural-log mel spectrogram [T, num_mels].

    The same input gives the same waveform; `seed` draws the first phases. Raises NonFiniteError for
    a spectrogram with NaN or infinite values, ValueError for one of another shape.
    """
    from torchaudio.functional import griffinlim

    if log_mel.ndim != 2 or log_mel.shape[1] != config.num_mels:
        shape = tuple(log_mel.shape)
        raise ValueError(f"the vocoder takes a mel [frames, {config.num_mels}], not {shape}")
    num_bad = int((~torch.isfinite(log_mel)).sum())
    if num_bad:
        raise NonFiniteError(
            f"the mel spectrogram for the vocoder has {num_bad} non-finite values of "
            f"{log_mel.numel()}; the model that made it is broken, use an earlier checkpoint of it"
        )
    num_frames = len(log_mel)
    if num_frames == 0:
        return log_mel.new_zeros(0, dtype=torch.float32)
    magnitude = mel_to_magnitude(log_mel, config).T
    # Silence after the end: the last window needs it, and the phase search a minimum length.
    num_extra = 2 * config.num_fft // config.hop
    magnitude = F.pad(magnitude, (0, num_extra), value=MAGNITUDE_FLOOR)
    device = log_mel.device
    is_cuda = device.type == "cuda"
    # torchaudio draws from the global generator of the device; only that one is borrowed.
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
