"""The TTS view: characters, audio, batches by duration, and unusable samples."""

from pathlib import Path

import numpy as np
import pytest

from muomni.data.sampling.plan import Batching, Plan
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.tts import TtsView
from muomni.errors import DataError
from tests.conversations import tone, write_tts_dataset


@pytest.fixture(scope="module")
def view(tokenizer: Tokenizer) -> TtsView:
    return TtsView(tokenizer)


def test_text_matches_audio(tmp_path: Path, view: TtsView, tokenizer: Tokenizer) -> None:
    source = Source([write_tts_dataset(tmp_path / "tts")], "train")
    batch = view.collate([[view.example(source.read(i), None)] for i in (0, 4)])
    for row, text in enumerate(("low", "middle")):
        mask, ids = batch["text_mask"][row], tokenizer.encode(text)
        characters = tokenizer.characters(ids)
        assert batch["character_ids"][row][mask].tolist() == characters.ids
        assert batch["text_ids"][row][mask].tolist() == [ids[i] for i in characters.token_positions]
    assert batch["lengths"].tolist() == [4800, 8000] and batch["waveform"].shape[1] >= 8000
    assert not batch["waveform"][0, 4800:].any()
    assert float(batch["units"]) == pytest.approx(0.8)


def test_training_clips_start_within_a_frame(tmp_path: Path, view: TtsView) -> None:
    """The codec then gives other codes for the same speech; the planned length includes the silence."""
    source = Source([write_tts_dataset(tmp_path / "tts")], "train")
    plain = view.example(source.read(0), None).waveform
    shifts = set()
    for seed in range(20):
        shifted = view.example(source.read(0), np.random.default_rng(seed)).waveform
        shift = len(shifted) - len(plain)
        assert not shifted[:shift].any() and np.array_equal(shifted[shift:], plain)
        assert len(shifted) <= view.lengths(source)[np.array([0])][0] * 160
        shifts.add(shift)
    assert 0 <= min(shifts) < 160 and 480 <= max(shifts) < 640


def test_micro_batches_respect_their_duration_limit(tmp_path: Path, view: TtsView) -> None:
    source = Source([write_tts_dataset(tmp_path / "tts", num_each=8)], "train")
    lengths = view.lengths(source)
    plan = Plan(lengths, Batching("bucket", 200, 200), seed=0)
    for step in range(plan.num_steps(1)):
        ids = plan.rank_step(step, 0, 1)[0].ids
        examples = [view.example(source.read(i), np.random.default_rng(i)) for i in ids]
        batch = view.collate([[example] for example in examples])
        assert batch["waveform"].numel() <= 2.0 * 16_000


def test_empty_batch_has_one_empty_example(view: TtsView) -> None:
    batch = view.collate([[]])
    assert batch["text_ids"].shape == (1, 1) and not batch["text_mask"].any()
    assert batch["lengths"].tolist() == [0] and float(batch["units"]) == 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"wav": tone(200)}, "'x' has no text"),
        ({"wav": tone(200), "txt": b""}, "text of sample 'x' is empty"),
        ({"wav": tone(200), "txt": b"\xff"}, "'x': its .txt is not UTF-8"),
        ({"txt": b"low"}, "'x' has no audio clip"),
        ({"wav": b"RIFF", "txt": b"low"}, "x.wav: broken audio clip"),
    ],
)
def test_error_names_an_unusable_sample(
    view: TtsView, members: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        view.example({"__key__": "x", **members}, None)
