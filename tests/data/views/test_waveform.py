"""The waveform view: crops and batch shapes."""

import numpy as np
import pytest

from muomni.data.sampling.order import generator
from muomni.data.views.waveform import WaveformView
from tests.media_corpora import flac

RAMP = np.linspace(-0.9, 0.9, 32_000, dtype=np.float32)


def sample(num_samples: int = 32_000) -> dict[str, object]:
    return {"__key__": "k", "flac": flac(RAMP[:num_samples])}


def test_crops_are_full_code_frames_at_random_positions() -> None:
    view = WaveformView(crop_s=0.5)
    assert view.num_samples == 7_680  # 12 code frames of 640
    starts = set()
    for epoch in range(6):
        crop = view.example(sample(), generator(0, epoch, 0))
        assert len(crop.waveform) == view.num_samples
        starts.add(float(crop.waveform[0]))
    assert len(starts) == 6
    again = view.example(sample(), generator(0, 5, 0))
    assert (again.waveform == crop.waveform).all() and again.seed == crop.seed


def test_evaluation_crops_the_center_and_short_audio_is_not_cropped() -> None:
    view = WaveformView(crop_s=0.5)
    crop = view.example(sample(), None)
    start = (32_000 - view.num_samples) // 2
    np.testing.assert_allclose(crop.waveform, RAMP[start : start + view.num_samples], atol=1e-4)
    assert len(view.example(sample(5_000), generator(0, 0, 0)).waveform) == 5_000


def test_batch_shape_is_constant_with_broken_or_no_samples() -> None:
    view = WaveformView(crop_s=0.5)
    crop = view.example(sample(5_000), None)
    batch = view.collate([[crop], [], [crop]])
    assert batch["waveform"].shape == (3, 7_680)
    assert batch["lengths"].tolist() == [5_000, 0, 5_000]
    assert batch["units"] == pytest.approx(10_000 / 16_000)
    empty = view.collate([])
    assert empty.keys() == batch.keys() and empty["lengths"].tolist() == [0]
    assert empty["waveform"].shape == (1, 7_680)
