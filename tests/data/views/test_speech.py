"""The speech view: labels, augmentation, planned lengths, and unusable samples."""

from pathlib import Path

import numpy as np
import pytest

from muomni.data.loading.loader import PlannedDataset
from muomni.data.sampling.order import generator
from muomni.data.sampling.plan import MicroBatch
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.speech import SpeechView
from muomni.errors import DataError
from tests.corpora import write_tokenizer
from tests.media_corpora import flac, say, write_speech_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speech")
    write_speech_dataset(root / "speech")
    write_tokenizer(root / "tokenizer.model")
    return root


@pytest.fixture(scope="module")
def view(root: Path) -> SpeechView:
    return SpeechView(CtcUnits(Tokenizer.load(root / "tokenizer.model"), 0), perturb_speed=True)


@pytest.fixture(scope="module")
def source(root: Path) -> Source:
    return Source([Manifest.load(root / "speech")], "train")


def sample(text: bytes = b"Cat, DOOR!", audio: bytes | None = None) -> dict[str, object]:
    return {"__key__": "k1", "txt": text, "flac": audio or flac(say(["cat", "door"]))}


def test_labels_are_the_spoken_words(view: SpeechView) -> None:
    batch = view.collate([[view.example(sample(), None)], [view.example(sample(b"a cat"), None)]])
    texts = [
        view.units.tokenizer.decode(ids[:n].tolist())
        for ids, n in zip(batch["labels"], batch["label_lengths"], strict=True)
    ]
    assert texts == ["cat door", "a cat"]
    assert batch["labels"][1, batch["label_lengths"][1] :].unique().tolist() == [0]
    assert batch["units"] == pytest.approx(2 * 0.48)


def test_augmentation_is_a_function_of_seed_epoch_and_sample(
    view: SpeechView, source: Source
) -> None:
    dataset = PlannedDataset(source, view, seed=3)
    together = dataset[MicroBatch(((4,), (5,)), ((2,), (2,)))].tensors
    alone = dataset[MicroBatch(((5,),), ((2,),))].tensors
    length = int(alone["lengths"][0])
    assert together["lengths"][1] == length and together["seeds"][1] == alone["seeds"][0]
    assert (together["waveform"][1, :length] == alone["waveform"][0, :length]).all()
    epochs = [dataset[MicroBatch(((5,),), ((e,),))].tensors for e in range(8)]
    assert len({int(batch["seeds"][0]) for batch in epochs}) == 8
    assert len({int(batch["lengths"][0]) for batch in epochs}) == 3  # three speeds


def test_evaluation_is_not_augmented(view: SpeechView, source: Source) -> None:
    dataset = PlannedDataset(source, view, seed=3)
    batch = dataset[MicroBatch(((5,),))].tensors
    assert int(batch["seeds"][0]) == 0
    again = dataset[MicroBatch(((5,),))].tensors
    assert (batch["waveform"] == again["waveform"]).all()


def test_no_augmented_audio_is_longer_than_planned(view: SpeechView, source: Source) -> None:
    planned = view.lengths(source).all()
    for index in range(len(source)):
        for epoch in range(4):
            augmented = view.example(source.read(index), generator(0, epoch, index))
            assert -(-len(augmented.waveform) // 160) <= planned[index]
    fixed = SpeechView(view.units, perturb_speed=False)
    assert (fixed.lengths(source).all() < planned).all()


def test_empty_batch_has_all_keys_and_no_weight(view: SpeechView) -> None:
    full, empty = view.collate([[view.example(sample(), None)]]), view.collate([])
    assert full.keys() == empty.keys()
    assert all(full[key].dtype == empty[key].dtype for key in full)
    assert empty["lengths"].tolist() == [0] == empty["label_lengths"].tolist()
    assert empty["units"] == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (sample(b"..."), "transcript of sample 'k1' has no words"),
        (sample(b"\xff\xfe"), "'k1': its .txt is not UTF-8"),
        ({"__key__": "k1", "flac": flac(np.zeros(9, np.float32))}, "'k1' has no text"),
        (sample(audio=b"junk"), "k1.flac"),
    ],
)
def test_error_names_an_unusable_sample(
    broken: dict[str, object], message: str, view: SpeechView
) -> None:
    with pytest.raises(DataError, match=message):
        view.example(broken, None)
