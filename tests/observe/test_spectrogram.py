from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from muomni.config.models import MelConfig
from muomni.observe.spectrogram import write_spectrograms, write_waveform


def _bright(path: Path, column: int) -> list[int]:
    """The rows of a column of pixels whose color is that of the maximum."""
    pixels = np.asarray(Image.open(path)).astype(int)
    return np.flatnonzero((pixels[:, column] == (252, 244, 180)).all(axis=1)).tolist()


def test_panels_are_stacked_with_low_frequencies_at_the_bottom(tmp_path: Path) -> None:
    low, high = np.full((100, 80), -11.0), np.full((60, 80), -11.0)
    low[:, 0] = high[:, 79] = 0.0
    panels = {"original": low, "reconstruction": high}
    write_spectrograms(tmp_path / "a.png", panels, MelConfig(), floor=-11.5)
    first, last = 40, 40 + 3 * 99  # columns of the first and the last frame
    # A panel of 2 * 80 rows is below a title of 16.
    assert _bright(tmp_path / "a.png", first) == [16 + 158, 16 + 159, 2 * 16 + 160, 2 * 16 + 161]
    assert _bright(tmp_path / "a.png", last) == [16 + 158, 16 + 159]  # the shorter one is padded


def test_axes_show_kilohertz_and_seconds(tmp_path: Path) -> None:
    tone = np.full((100, 80), -11.0)
    # The channel that is nearest to 1 kHz: 15 mel between 0.3 (20 Hz) and 44.49 (7.6 kHz) in 81 steps.
    tone[:, round((15 - 0.3) / (44.49 - 0.3) * 81 - 1)] = 0.0
    write_spectrograms(tmp_path / "a.png", {"tone": tone}, MelConfig(), floor=-11.5)
    dark = np.asarray(Image.open(tmp_path / "a.png")).sum(axis=2) == 0
    ticks = np.flatnonzero(dark[:, 37])  # left of the panel; none where a label would not fit
    assert len(ticks) == 5  # 0.25, 0.5, 1, 2, and 4 kHz
    assert abs(ticks[2] - np.mean(_bright(tmp_path / "a.png", 50))) <= 1
    seconds = np.flatnonzero(dark[16 + 160 + 2])
    assert seconds.tolist() == [40 + 30 * k for k in range(11) if 40 + 30 * k < 340]


def test_waveforms_are_clipped_and_16_bit(tmp_path: Path) -> None:
    write_waveform(tmp_path / "a.wav", np.array([0.0, 0.5, 3.0, -3.0], dtype=np.float32))
    samples, rate_hz = soundfile.read(tmp_path / "a.wav")
    assert rate_hz == 16_000 and soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    np.testing.assert_allclose(samples, [0, 0.5, 1, -1], atol=1e-3)
