"""The bundled corpora become the documented data root, without leakage between splits."""

import json
from pathlib import Path

import pytest

from data_prep import bundled
from data_prep.cli.main import main
from data_prep.corpus import image_group, transcript_group
from data_prep.sharding.shard_plan import split_of
from muomni.data.shards.manifest import Manifest, Task, find_datasets
from muomni.data.shards.reader import SplitReader
from muomni.data.text.tokenizer import Tokenizer
from tests.data_prep.commands import Capture, fails

FOLDERS: dict[str, Task] = {
    "text": "text",
    "image_caption": "image-caption",
    "speech": "speech",
    "speech_synthetic": "speech",
    "tts": "tts",
    "tts_librispeech": "tts",
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


def test_test_conversations_have_unseen_images(root: Path) -> None:
    def images(folder: str, split: str) -> set[bytes]:
        reader = SplitReader(Manifest.load(root / folder), split)
        samples = (reader.read(index) for index in range(len(reader)))
        return {
            data
            for sample in samples
            for name, data in sample.items()
            if name.endswith("png") and isinstance(data, bytes)
        }

    assert not images("sft", "test") & images("image_caption", "train")
    assert images("sft", "test") == images("image_caption", "test")


def test_spoken_answers_have_audio(root: Path) -> None:
    reader = SplitReader(Manifest.load(root / "sft"), "test")
    kinds = set()
    for index in range(len(reader)):
        sample = reader.read(index)
        kinds.add(str(sample["__key__"]).partition("-")[0])
        answer = json.loads(sample["json"])["turns"][-1]["content"]
        if str(sample["__key__"]).startswith("speak"):
            assert [part["type"] for part in answer] == ["text", "audio"]
            assert answer[1]["name"] in sample
    assert kinds == {"caption", "ask", "transcribe", "speak", "repeat"}


def test_second_run_changes_nothing(root: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.tar")}
    main(["sample", "--out", str(root)])
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.tar")} == before


def test_stages_find_their_datasets(root: Path) -> None:
    for task in set(FOLDERS.values()):
        assert find_datasets(root, task)


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
