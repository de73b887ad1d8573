"""Conversion of a conversation to arguments of launch/generate.py."""

import json
from pathlib import Path
from typing import Any

from scripts.answer_held_out import read_example

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


def test_longer_conversations_are_skipped() -> None:
    turns = [("user", [TEXT]), ("assistant", [TEXT])] * 2
    assert read_example(sample(*turns), Path("out")) is None
