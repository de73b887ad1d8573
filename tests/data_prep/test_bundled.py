"""The bundled corpora become the documented data root, without leakage between splits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import bundled
from data_prep.cli.main import main
from data_prep.corpus import image_group, transcript_group
from data_prep.sharding.splits import split_of
from muomni.data.shards.manifest import Manifest, Task, find_datasets
from muomni.data.shards.reader import SplitReader
from muomni.data.text.tokenizer import Tokenizer
from tests.data_prep.commands import Capture, fails

FOLDERS: dict[str, Task] = {
    "text": "text",
    "text_wordnet": "text",
    "image_caption": "image-caption",
    "image_emoji": "image-caption",
    "speech": "speech",
    "tts": "tts",
    "sft": "sft",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "sample"
    main(["sample", "--out", str(out)])
    return out


def test_datasets_and_tokenizer(root: Path) -> None:
    for folder, task in FOLDERS.items():
        manifest = Manifest.load(root / folder)
        assert (manifest.task, manifest.dropped) == (task, {})
        assert set(manifest.splits) == {"train", "val", "test"}
        assert manifest.license
    assert Tokenizer.load(root / "tokenizer.model").vocab_size == 512


def test_groups_stay_in_one_split_across_datasets(root: Path) -> None:
    """Test images and prompts of one stage are not in the training data of another."""
    seen: dict[int, str] = {}
    for folder in FOLDERS:
        manifest = Manifest.load(root / folder)
        for split in manifest.splits:
            for group in SplitReader(manifest, split).columns["group_hash"].tolist():
                assert seen.setdefault(group, split) == split


def test_questions_of_test_have_unseen_media(root: Path) -> None:
    """Spoken answers may be clips of the training split: words of the vocabulary."""

    def media(folder: str, split: str) -> set[bytes]:
        reader = SplitReader(Manifest.load(root / folder), split)
        found = set()
        for index in range(len(reader)):
            sample = reader.read(index)
            turns = json.loads(sample["json"]).get("turns", [])
            parts = [part for turn in turns if turn["role"] == "user" for part in turn["content"]]
            names = [part["name"] for part in parts if part["type"] != "text"]
            found |= {sample[name] for name in names or ("png", "ogg") if name in sample}
        return found

    asked = media("sft", "test")
    folders = ("image_caption", "image_emoji", "speech")
    assert not asked & set().union(*(media(folder, "train") for folder in folders))
    assert asked < set().union(*(media(folder, "test") for folder in folders))


def test_unseen_voices_and_new_sentences_are_held_out(root: Path) -> None:
    voices: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    for sample in _samples(root / "speech"):
        split = str(sample["split"])
        voices.setdefault(split, set()).add(sample["speaker"])
        if not sample["type"].startswith("asked"):  # fixed questions, known in other voices
            texts.setdefault(split, set()).add(sample["text"])
    assert voices["val"] - voices["train"] == {"flite-kal"}
    assert voices["test"] - voices["train"] == {"flite-rms", "espeak-rp-f5"}
    assert not texts["test"] & (texts["train"] | texts["val"])
    words = {word for text in texts["train"] for word in text.split()}
    spoken = {s["text"] for s in _samples(root / "speech") if s["type"] != "prompts"}
    assert {word for text in spoken for word in text.split()} <= words


def test_conversations_have_types_and_spoken_answers(root: Path) -> None:
    types = {}
    for sample in _samples(root / "sft"):
        answer = sample["turns"][-1]["content"]
        is_spoken = sample["type"] in ("read_aloud", "answer_aloud")
        assert [part["type"] for part in answer] == ["text", "audio"][: 1 + is_spoken]
        types.setdefault(sample["split"], set()).add(sample["type"])
    assert types["train"] < types["test"] == types["val"]
    assert types["test"] - types["train"] == {"write_down_unseen_voice"}
    assert len(types["train"]) == 18


def test_second_run_changes_nothing(root: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.tar")}
    main(["sample", "--out", str(root)])
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.tar")} == before


def _samples(folder: Path) -> Iterator[dict[str, Any]]:
    """The metadata of all samples of a dataset, with their splits."""
    manifest = Manifest.load(folder)
    for split in manifest.splits:
        reader = SplitReader(manifest, split)
        for index in range(len(reader)):
            yield {**json.loads(reader.read(index)["json"]), "split": split}


def test_stages_find_their_datasets(root: Path) -> None:
    for task in set(FOLDERS.values()):
        assert find_datasets(root, task)


def test_other_folder_of_corpora_is_kept(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/mine.txt").write_text("text")
    for more in ([], ["--overwrite"]):
        error = fails(capsys, "sample", "--out", str(tmp_path), *more)
        assert "corpora was not created by data_prep" in error
    assert (tmp_path / "corpora/mine.txt").is_file()


def test_samples_are_missing_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(bundled, "SAMPLES", tmp_path / "samples")
    error = fails(capsys, "sample", "--out", str(tmp_path / "out"))
    assert "clone the muomni repository" in error
    assert not (tmp_path / "out").exists()


def test_groups_are_assigned_to_the_same_splits_as_in_earlier_versions() -> None:
    """The golden curves depend on these splits."""
    groups = (image_group("a/000000000001.png"), transcript_group("Press 1, please."))
    assert groups == ("picture:000000000001", "speech:press 1 please")  # terms: allow
    assert [split_of(group, 0.08, 0.2) for group in groups] == ["test", "train"]
