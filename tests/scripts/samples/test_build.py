"""Reproducible archives, and sentences of one split each."""

import tarfile
from pathlib import Path

from scripts.samples.build import pack
from scripts.samples.vocabulary import SPEECH_TYPES, plain, split_of, take


def test_archives_depend_on_names_and_contents_only(tmp_path: Path) -> None:
    packed = []
    for clone in ("a", "b"):
        folder = tmp_path / clone / "images"
        for name in ("2.png", "1.png") if clone == "a" else ("1.png", "2.png"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
        pack(folder, tmp_path / f"{clone}.tar.xz")
        packed.append((tmp_path / f"{clone}.tar.xz").read_bytes())
    assert packed[0] == packed[1]
    with tarfile.open(tmp_path / "a.tar.xz") as archive:
        assert archive.getnames() == ["images/1.png", "images/2.png"]


def test_sentences_are_new_in_each_split() -> None:
    for type in SPEECH_TYPES:
        texts = {
            split: {s.text for key in "ab" for s in take(type, key, split, 30)}
            for split in ("train", "val", "test")
        }
        assert not texts["train"] & texts["test"] and not texts["train"] & texts["val"]
        assert all(split_of(text) == split for split in texts for text in texts[split])


def test_transcripts_have_no_punctuation() -> None:
    assert plain("What is this? Answer: aloud.") == "what is this answer aloud"
