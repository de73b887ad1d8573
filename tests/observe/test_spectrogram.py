from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from muomni.observe.spectrogram import write_spectrograms, write_waveform


def test_panels_are_stacked_with_low_frequencies_at_the_bottom(tmp_path: Path) -> None:
    low, high = np.full((10, 8), -11.0), np.full((6, 8), -11.0)
    low[:, 0] = high[:, 7] = 0.0
    write_spectrograms(tmp_path / "a.png", [low, high], floor=-11.5)
    pixels = np.asarray(Image.open(tmp_path / "a.png")).astype(int).sum(2)
    assert pixels.shape == (2 * 16 + 6, 30)
    assert pixels[15, 0] > pixels[0, 0] and pixels[22, 0] > pixels[37, 0]
    assert pixels[22, 29] < pixels[22, 0]  # the shorter one is padded with silence


def test_waveforms_are_clipped_and_16_bit(tmp_path: Path) -> None:
    write_waveform(tmp_path / "a.wav", np.array([0.0, 0.5, 3.0, -3.0], dtype=np.float32))
    samples, rate_hz = soundfile.read(tmp_path / "a.wav")
    assert rate_hz == 16_000 and soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    np.testing.assert_allclose(samples, [0, 0.5, 1, -1], atol=1e-3)
