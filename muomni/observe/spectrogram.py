"""Write log-mel spectrograms as images and waveforms as WAV files."""

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from muomni.config.models import SAMPLE_RATE_HZ

_PIXELS_PER_FRAME = 3
_PIXELS_PER_CHANNEL = 2
_GAP_PIXELS = 6
# Colors of evenly spaced levels, dark to bright, with linear interpolation.
_COLORS = np.array(
    [(8, 8, 32), (64, 16, 96), (152, 36, 104), (224, 84, 68), (252, 164, 60), (252, 244, 180)]
)


def write_spectrograms(path: Path, log_mels: list[np.ndarray], floor: float) -> None:
    """Write log-mel spectrograms [T, num_mels] below each other as a PNG; low frequencies at the bottom.

    All share one color scale, from `floor` to the maximum of the first.
    """
    top = max(float(log_mels[0].max()), floor + 1.0)
    width = max(len(log_mel) for log_mel in log_mels)
    panels = []
    for log_mel in log_mels:
        padded = np.pad(log_mel, ((0, width - len(log_mel)), (0, 0)), constant_values=floor)
        panels += [_color(padded.T[::-1], floor, top), _gap(width)]
    Image.fromarray(np.concatenate(panels[:-1])).save(path)


def write_waveform(path: Path, waveform: np.ndarray) -> None:
    """Write mono float32 samples as a 16-bit WAV, clipped to full scale."""
    soundfile.write(path, np.clip(waveform, -1.0, 1.0), SAMPLE_RATE_HZ, subtype="PCM_16")


def level_colors(levels: np.ndarray, floor: float, top: float) -> np.ndarray:
    """Map levels to uint8 colors [..., 3], from dark at `floor` to bright at `top`."""
    position = np.clip((levels - floor) / (top - floor), 0, 1) * (len(_COLORS) - 1)
    lower = np.minimum(position.astype(int), len(_COLORS) - 2)
    share = (position - lower)[..., None]
    pixels = _COLORS[lower] * (1 - share) + _COLORS[lower + 1] * share
    return pixels.round().astype(np.uint8)


def _color(values: np.ndarray, floor: float, top: float) -> np.ndarray:
    image = level_colors(values, floor, top)
    return image.repeat(_PIXELS_PER_CHANNEL, axis=0).repeat(_PIXELS_PER_FRAME, axis=1)


def _gap(width: int) -> np.ndarray:
    return np.full((_GAP_PIXELS, width * _PIXELS_PER_FRAME, 3), 255, dtype=np.uint8)
