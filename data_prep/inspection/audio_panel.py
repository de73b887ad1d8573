"""Draw an audio clip: its waveform above its log-mel spectrogram, on a common time axis.

At the original sample rate, so that a wrong rate, an empty upper half, or clipping is visible.
"""

import numpy as np
from PIL import Image, ImageDraw

from muomni.data.media.decode import read_audio
from muomni.observe.spectrogram import level_colors

WIDTH = 640
_WAVE_HEIGHT, _MEL_HEIGHT, _AXIS_HEIGHT = 64, 96, 14
HEIGHT = _WAVE_HEIGHT + _MEL_HEIGHT + _AXIS_HEIGHT
_NUM_MELS = 48
_WINDOW_S = 0.025
_RANGE_DB = 80
_WAVE_COLOR, _CLIP_COLOR, _LINE_COLOR = (40, 90, 160), (200, 30, 30), (210, 210, 210)
_TICK_STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600)
_MAX_TICKS = 8


def audio_panel(data: bytes) -> Image.Image:
    """Draw an audio clip, `WIDTH` x `HEIGHT` pixels.

    Raises `DataError` if it is broken.
    """
    samples, sample_rate_hz = read_audio(data)
    mono = samples.mean(axis=1)
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    panel.paste(Image.fromarray(_waveform(mono)), (0, 0))
    mel = level_colors(_log_mel_db(mono, sample_rate_hz), -_RANGE_DB, 0)
    height_per_mel = _MEL_HEIGHT // _NUM_MELS
    panel.paste(Image.fromarray(mel.repeat(height_per_mel, axis=0)), (0, _WAVE_HEIGHT))
    _draw_axis(ImageDraw.Draw(panel), len(mono) / sample_rate_hz, sample_rate_hz)
    return panel


def _waveform(mono: np.ndarray) -> np.ndarray:
    """uint8 [wave height, width, 3]: the range from minimum to maximum of each column's samples."""
    edges = np.linspace(0, len(mono), WIDTH + 1).astype(int)
    starts = np.minimum(edges[:-1], len(mono) - 1)
    high, low = np.maximum.reduceat(mono, starts), np.minimum.reduceat(mono, starts)
    # Columns include the first sample of the next, so that the line has no gaps.
    high[:-1] = np.maximum(high[:-1], mono[starts[1:]])
    low[:-1] = np.minimum(low[:-1], mono[starts[1:]])
    rows = np.linspace(1, -1, _WAVE_HEIGHT)[:, None]
    step = 2 / (_WAVE_HEIGHT - 1)
    image = np.full((_WAVE_HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    image[_WAVE_HEIGHT // 2] = _LINE_COLOR
    image[(rows <= high + step / 2) & (rows >= low - step / 2)] = _WAVE_COLOR
    image[:, np.maximum(high, -low) >= 1 - 2**-15] = _CLIP_COLOR
    return image


def _log_mel_db(mono: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Decibels relative to the maximum, [mels, width], from high to low frequencies."""
    size = max(16, round(_WINDOW_S * sample_rate_hz))
    padded = np.pad(mono, (size // 2, size))
    starts = np.linspace(0, len(mono), WIDTH, endpoint=False).astype(int)
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = power @ _mel_bands(size, sample_rate_hz)
    decibels = 10 * np.log10(np.maximum(mel, 1e-12)).T[::-1]
    return decibels - decibels.max()


def _mel_bands(size: int, sample_rate_hz: int) -> np.ndarray:
    """Triangular filters, evenly spaced in mel, [size // 2 + 1, mels]."""
    top = 2595 * np.log10(1 + sample_rate_hz / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, _NUM_MELS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(size, 1 / sample_rate_hz)[:, None]
    # At least one bin wide on each side, so that low bands are not empty.
    width = np.maximum(np.diff(edges), sample_rate_hz / size)
    rising = (bins - edges[:-2]) / width[:-1]
    falling = (edges[2:] - bins) / width[1:]
    return np.clip(np.minimum(rising, falling), 0, None)


def _draw_axis(draw: ImageDraw.ImageDraw, duration_s: float, sample_rate_hz: int) -> None:
    steps = (step for step in _TICK_STEPS_S if duration_s / step <= _MAX_TICKS)
    step = next(steps, _TICK_STEPS_S[-1])
    top = _WAVE_HEIGHT + _MEL_HEIGHT
    for number in range(int(duration_s / step) + 1):
        x = round(number * step / duration_s * WIDTH)
        draw.line([(x, top), (x, top + 3)], fill="black")
        if x < WIDTH - 90:
            draw.text((x + 2, top + 1), f"{number * step:g} s", fill="black")
    note = f"0-{sample_rate_hz / 2000:g} kHz"
    draw.text((WIDTH - 4, top + 1), note, fill="black", anchor="ra")
