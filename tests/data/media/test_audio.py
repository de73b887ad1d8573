"""Reading audio clips of samples, planned frames, and padding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from muomni.data.media.audio import pad_waveforms, read_audio
from muomni.data.sampling.lengths import mel_frames
from muomni.data.shards.source import Source
from muomni.errors import DataError
from muomni.models.speech.mel import num_mel_frames
from tests.corpora import write_dataset
from tests.media_corpora import flac, say, speech_sample


def test_audio_is_read_as_16_khz_mono() -> None:
    waveform = say(["cat", "door"])
    found = read_audio({"__key__": "a", "flac": flac(waveform)})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, waveform, atol=1e-4)
    stereo = np.stack([waveform, waveform], 1)[::2]
    assert len(read_audio({"__key__": "a", "flac": flac(stereo, 8000)})) == len(waveform)


def test_error_names_a_missing_or_broken_audio_clip() -> None:
    with pytest.raises(DataError, match="sample 'k1' has no audio clip"):
        read_audio({"__key__": "k1", "txt": b"x"})
    with pytest.raises(DataError, match=r"k2\.flac"):
        read_audio({"__key__": "k2", "flac": b"not audio"})


def test_planned_frames_cover_the_frames_of_the_model(tmp_path: Path) -> None:
    samples = []
    for i, num_samples in enumerate((1, 159, 160, 161, 7_999, 16_000)):
        key, members, cost = speech_sample(f"k{i}", ["cat"], 0)
        members[0] = ("flac", flac(np.zeros(num_samples, dtype=np.float32)))
        duration_ms = max(1, round(num_samples / 16))
        samples.append((key, members, type(cost)(duration_ms, num_audios=1)))
    source = Source([write_dataset(tmp_path / "speech", "speech", {"train": samples})], "train")
    planned = mel_frames(source).all()
    for i in range(len(source)):
        num_samples = torch.tensor(len(read_audio(source.read(i))))
        assert num_mel_frames(num_samples, 160) <= planned[i] <= num_samples / 160 + 2
    assert (mel_frames(source, 2.0).all() >= 2 * (planned - 1)).all()


def test_padding_is_zero_and_no_audio_gives_length_zero() -> None:
    waveform, lengths = pad_waveforms([np.ones(3, np.float32), np.ones(500, np.float32)])
    assert waveform.shape == (2, 500) and lengths.tolist() == [3, 500]
    assert waveform[0, 3:].abs().sum() == 0
    waveform, lengths = pad_waveforms([])
    assert waveform.shape == (1, 160) and lengths.tolist() == [0]
