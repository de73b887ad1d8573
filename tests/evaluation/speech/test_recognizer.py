"""Recognition with the training word list: its words, their spelling, and the transcripts."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from muomni.checkpoint.export import read_export
from muomni.config.run import DataSection
from muomni.data.shards.manifest import find_datasets
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.speech import SpeechView
from muomni.evaluation.context import open_context
from muomni.evaluation.metrics.error_rates import ErrorCounts
from muomni.evaluation.request import EvaluationRequest
from muomni.evaluation.speech.recognizer import Recognizer, find_recognizer
from muomni.evaluation.speech.training_transcripts import TrainingTranscripts
from muomni.models.speech.word_decoder import Word, WordDecoder
from tests.corpora import Sample, write_dataset
from tests.evaluation.runs import CPU, evaluate
from tests.media_corpora import say, speech_sample
from tests.ranks import RankPool


def spoken(key: str, text: str) -> Sample:
    """An audio clip with a transcript that need not match it."""
    key, members, cost = speech_sample(key, ["cat"], seed=0)
    return key, [members[0], ("txt", text.encode())], cost


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speech datasets and a TTS dataset; a mask excludes one sample of the first."""
    root = tmp_path_factory.mktemp("corpora")
    train = [spoken("a0", "One, two!"), spoken("a1", "one two"), spoken("a2", "masked")]
    silent = ("a3", spoken("a3", "")[1][:1], spoken("a3", "")[2])  # has no transcript
    first = {
        "train": [*train, silent],
        "val": [spoken("a4", "held")],
        "test": [spoken("a5", "out")],
    }
    write_dataset(root / "first", "speech", first)
    write_dataset(root / "second", "speech", {"train": [spoken("b0", "three")]})
    write_dataset(root / "other", "tts", {s: [spoken(f"c{s}", "made")] for s in ("train", "val")})
    (root / "first" / "exclude").mkdir()
    np.save(root / "first" / "exclude" / "mask.npy", np.array([2], dtype=np.uint64))
    mask = {"split": "train", "ids_file": "mask.npy"}
    (root / "first" / "exclude" / "mask.json").write_text(json.dumps(mask))
    return root


def transcripts_of(root: Path, train: Source | None = None) -> TrainingTranscripts:
    return TrainingTranscripts(SimpleNamespace(data=DataSection(root=str(root)), train=train))  # type: ignore[arg-type]


def test_word_list_holds_training_words_of_speech_datasets(root: Path) -> None:
    """Held-out, excluded, and broken samples and other tasks do not contribute."""
    assert transcripts_of(root).words() == Counter(one=2, two=2, three=1)


def _words_of(root: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    transcripts = transcripts_of(root, _train_source(root))
    return sorted(transcripts.words().items()), transcripts.constants()


def _train_source(root: Path) -> Source:
    return Source(find_datasets(root, "speech"), "train")


def test_word_list_is_the_same_on_all_ranks(root: Path, two_ranks: RankPool) -> None:
    alone = _words_of(root)
    assert alone == ([("one", 2), ("three", 1), ("two", 2)], ("", "one two"))
    assert two_ranks.run(_words_of, root=root) == [alone, alone]


def test_constants_and_words_read_samples_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original: Callable[[Source, int], dict[str, object]] = Source.read
    monkeypatch.setattr(Source, "read", lambda *args: read.append(args[1]) or original(*args))
    transcripts = transcripts_of(root, _train_source(root))
    assert transcripts.constants() == ("", "one two")
    transcripts.words()
    assert len(read) == len(_train_source(root).all_included)


def test_greedy_decoding_without_word_list_logs_warning(
    perception_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path / "other", "tts", {"train": [spoken("c", "made")]})
    recognizer = find_recognizer((perception_run,), CPU, transcripts_of(tmp_path))
    assert recognizer is not None and recognizer.word_decoder is None
    assert "using greedy CTC decoding for word errors: " in caplog.text
    transcription = recognizer.transcribe(torch.from_numpy(say(["cat", "door"])))
    assert transcription.words == transcription.greedy != ""


def test_words_are_spelled_in_the_units_of_the_encoder(
    perception_run: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(perception_run / "audio_encoder", tmp_path / "audio_encoder")
    manifest = tmp_path / "audio_encoder" / "export" / "export.json"
    content = json.loads(manifest.read_text())
    transcripts = transcripts_of(root)
    spelled = []
    transcripts.word_decoder = lambda units: spelled.append(units.num_merges)  # type: ignore
    for num_merges in (0, 7):
        content["config"]["options"]["num_merges"] = num_merges
        manifest.write_text(json.dumps(content))
        find_recognizer((tmp_path,), CPU, transcripts)
    assert spelled == [0, 7]


class _FakeEncoder:
    """Outputs the given tokens with high confidence, one frame each, with a blank before each."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        frames = torch.tensor([i for token in ids for i in (0, token)])
        self.logits = 8.0 * torch.nn.functional.one_hot(frames, vocab_size).float()[None]

    def eval(self) -> "_FakeEncoder":
        return self

    def __call__(self, waveform: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.logits, torch.tensor([self.logits.shape[1]])

    def ctc_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("num_merges", [0, 20, None])
def test_word_list_corrects_words_but_not_greedy_transcript(
    num_merges: int | None, perception_run: Path
) -> None:
    tokenizer = Tokenizer.load(perception_run.parent / "tokenizer.model")
    units = CtcUnits(tokenizer, num_merges)
    words = {w: Word(units.encode(w), 1) for w in ("the", "door", "cat", "over", "é")}
    encoder = _FakeEncoder(units.encode("the odor cat é"), tokenizer.vocab_size)
    export = read_export(perception_run / "audio_encoder" / "export", "audio_encoder")
    recognizer = Recognizer(export, encoder, tokenizer, WordDecoder(words))  # type: ignore[arg-type]
    transcription = recognizer.transcribe(torch.zeros(160))
    assert transcription.greedy == "the odor cat é"
    decoded = transcription.words.split()
    assert decoded[0] == "the" and decoded[-2:] == ["cat", "é"]
    assert set(decoded) <= words.keys()
    assert recognizer.transcribe(torch.zeros(0)).words == ""


def test_audio_encoder_reports_wer_with_word_list(perception_run: Path) -> None:
    """Equals decoding the audio clips one by one, with the same baseline as `wer`."""
    request = {"stage": "audio_encoder", "run": perception_run, "split": "val"}
    context = open_context(EvaluationRequest(**request), CPU)
    encoder, view = context.model, context.stage.view()
    assert isinstance(view, SpeechView)
    decoder = TrainingTranscripts(context).word_decoder(view.units)
    assert decoder is not None
    errors = ErrorCounts(())
    for index in range(len(context.source)):
        batch = view.collate([[view.example(context.source.read(index), None)]])
        with torch.no_grad():
            hidden, lengths = encoder(batch["waveform"], batch["lengths"])
        (words,) = decoder.decode(encoder.ctc_logits(hidden), lengths)
        errors.add(context.source.read(index)["txt"].decode(), words=" ".join(words))
    result = evaluate(**request)
    expected = errors.reduce().rate("wer", "words")
    assert result["metrics"]["wer_with_word_list"] == pytest.approx(expected)
    baselines = result["baselines"]
    assert baselines["wer_with_word_list"]["value"] == baselines["wer"]["value"]
