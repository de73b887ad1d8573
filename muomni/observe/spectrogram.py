"""Write log-mel spectrograms as images and waveforms as WAV files."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from muomni.config.models import SAMPLE_RATE_HZ, MelConfig

_PIXELS_PER_FRAME = 3
_PIXELS_PER_CHANNEL = 2
# Room for labels, in pixels: left of a panel, above it, and below the last one.
_LEFT, _ABOVE, _BELOW = 40, 16, 32
_LABELED_HZ = (250, 500, 1000, 2000, 4000, 8000)
_MOST_SECONDS_LABELED = 10
# Colors of evenly spaced levels, dark to bright, with linear interpolation.
_COLORS = np.array(
    [(8, 8, 32), (64, 16, 96), (152, 36, 104), (224, 84, 68), (252, 164, 60), (252, 244, 180)]
)


def write_spectrograms(
    path: Path, panels: Mapping[str, np.ndarray], config: MelConfig, floor: float
) -> None:
    """Write log-mel spectrograms [T, num_mels] below each other as a PNG, with titles and axes.

    Low frequencies are at the bottom. All share one color scale, from `floor` to the maximum of the first,
    and one axis of time.
    """
    log_mels = list(panels.values())
    top = max(float(log_mels[0].max()), floor + 1.0)
    num_frames = max(len(log_mel) for log_mel in log_mels)
    height = config.num_mels * _PIXELS_PER_CHANNEL
    size = (
        _LEFT + max(num_frames, 60) * _PIXELS_PER_FRAME,
        len(panels) * (_ABOVE + height) + _BELOW,
    )
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for number, (title, log_mel) in enumerate(panels.items()):
        above = number * (_ABOVE + height) + _ABOVE
        padded = np.pad(log_mel, ((0, num_frames - len(log_mel)), (0, 0)), constant_values=floor)
        image.paste(Image.fromarray(_color(padded.T[::-1], floor, top)), (_LEFT, above))
        draw.text((_LEFT, above - 2), title, "black", anchor="ls")
        draw.text((_LEFT - 6, above - 2), "kHz", "black", anchor="rs")
        for hz, channel in _labeled_channels(config):
            y = above + height - (channel + 0.5) * _PIXELS_PER_CHANNEL
            draw.line((_LEFT - 4, y, _LEFT - 1, y), "black")
            draw.text((_LEFT - 6, y), f"{hz / 1000:g}", "black", anchor="rm")
    _draw_seconds(draw, num_frames, SAMPLE_RATE_HZ / config.hop, size[1] - _BELOW)
    image.save(path)


def _draw_seconds(draw: ImageDraw.ImageDraw, num_frames: int, rate_hz: float, y: int) -> None:
    """Label the axis of time at `y`; one frame is 1 / `rate_hz` seconds."""
    duration_s = num_frames / rate_hz
    interval_s = next(
        (each for each in (0.1, 0.2, 0.5, 1, 2, 5) if duration_s / each <= _MOST_SECONDS_LABELED),
        10,
    )
    for number in range(int(duration_s / interval_s) + 1):
        x = _LEFT + number * interval_s * rate_hz * _PIXELS_PER_FRAME
        draw.line((x, y, x, y + 3), "black")
        draw.text((x, y + 4), f"{number * interval_s:g}", "black", anchor="mt")
    draw.text((_LEFT, y + 17), "seconds", "black", anchor="lt")


def _labeled_channels(config: MelConfig) -> list[tuple[int, float]]:
    """Frequencies to label, and their positions among the channels (from 0) of Slaney's mel scale."""
    low, high = _mel(config.min_hz), _mel(config.max_hz)
    step = (high - low) / (config.num_mels + 1)
    channels = ((hz, (_mel(hz) - low) / step - 1) for hz in _LABELED_HZ)
    return [(hz, channel) for hz, channel in channels if 0 <= channel < config.num_mels]


def _mel(hz: float) -> float:
    """Slaney's mel scale: linear up to 1 kHz, then logarithmic."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


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
