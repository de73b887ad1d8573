"""Conversion of a conversation to arguments of launch/generate.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import answer_held_out
from scripts.answer_held_out import draw_examples, read_example

TEXT = {"type": "text", "text": "a red kite"}


def sample(*turns: tuple[str, list[dict[str, Any]]]) -> dict[str, bytes | str]:
    content = {"turns": [{"role": role, "content": parts} for role, parts in turns]}
    return {"__key__": "kite", "json": json.dumps(content).encode(), "0.png": b"pixels"}


def test_question_with_media_excludes_the_answer() -> None:
    image = {"type": "image", "name": "0.png"}
    question = [image, {"type": "text", "text": "What is it?"}]
    conversation = sample(("user", question), ("assistant", [TEXT]))
    example = read_example(conversation, Path("out"))
    assert example is not None
    assert example.arguments == ["--image", "out/kite.0.png", "--text", "What is it?"]
    assert example.files == {Path("out/kite.0.png"): b"pixels"}
    assert example.expected == "a red kite"


def test_file_after_text_becomes_placeholder() -> None:
    question = [{"type": "text", "text": "Name this:"}, {"type": "image", "name": "0.png"}]
    example = read_example(sample(("user", question), ("assistant", [TEXT])), Path("out"))
    assert example is not None
    assert example.arguments == ["--image", "out/kite.0.png", "--text", "Name this: <image>"]


def test_spoken_answer_requests_speech() -> None:
    spoken = [TEXT, {"type": "audio", "name": "0.flac"}]
    question = [{"type": "text", "text": "Say: a red kite"}]
    example = read_example(sample(("user", question), ("assistant", spoken)), Path("out"))
    assert example is not None
    assert example.arguments == ["--text", "Say: a red kite", "--speak", "out/kite.spoken.wav"]
    assert example.files == {}


def test_several_images_are_one_option() -> None:
    question = [{"type": "image", "name": name} for name in ("0.png", "1.png")]
    question.append({"type": "text", "text": "Which?"})
    content = {**sample(("user", question), ("assistant", [TEXT])), "1.png": b"other"}
    example = read_example(content, Path("out"))
    assert example is not None
    images = ["out/kite.0.png", "out/kite.1.png"]
    assert example.arguments == ["--image", *images, "--text", "Which?"]


def test_drawn_examples_are_of_different_types(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(type: str, answer: str) -> dict[str, bytes | str]:
        turns = [{"role": "user", "content": [TEXT]}]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return {"__key__": answer, "json": json.dumps({"turns": turns, "type": type}).encode()}

    class Reader(list):
        read = list.__getitem__

    samples = Reader(typed(type, f"{type}{n}") for type in "abc" for n in range(20))
    monkeypatch.setattr(answer_held_out, "find_datasets", lambda data, task: [None])
    monkeypatch.setattr(answer_held_out, "SplitReader", lambda manifest, split: samples)
    drawn = [
        [example.expected for example in draw_examples(Path(), Path(), seed, 2)]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(first[0] != second[0] for first, second in drawn)


def test_longer_conversations_are_skipped() -> None:
    turns = [("user", [TEXT]), ("assistant", [TEXT])] * 2
    assert read_example(sample(*turns), Path("out")) is None
