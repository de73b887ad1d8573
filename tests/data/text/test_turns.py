"""Turns: JSON round trip, placeholders, and malformed samples."""

import json
from typing import Any

import pytest

from muomni.data.text.turns import (
    MediaKind,
    Part,
    Turn,
    find_medium,
    read_turns,
    split_placeholders,
    turns_as_json,
)
from muomni.errors import DataError

TURNS = [
    Turn("system", (Part("text", "be kind"),)),
    Turn("user", (Part("image", "0.png"), Part("text", "what?"), Part("audio", "1.wav"))),
    Turn("assistant", (Part("text", "red"), Part("audio", "2.wav"))),
]


def sample(content: Any) -> dict[str, Any]:
    return {"json": json.dumps(content).encode()}


def test_json_round_trip() -> None:
    assert read_turns(sample({"turns": turns_as_json(TURNS)})) == TURNS


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "no .json member"),
        ({"json": b"{"}, "no list of turns"),
        (sample({"turns": [{"role": "robot", "content": []}]}), "role 'robot'"),
        (sample({"turns": [{"role": "user", "content": [{"type": "video"}]}]}), "type 'video'"),
    ],
)
def test_malformed_turns_are_rejected(members: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_turns(members)


def test_placeholders_take_files_in_order() -> None:
    files: dict[MediaKind, list[str]] = {"image": ["a.png", "b.png"], "audio": ["c.wav"]}
    assert split_placeholders("<image> left <audio><image> right", files) == [
        Part("image", "a.png"), Part("text", "left"), Part("audio", "c.wav"),
        Part("image", "b.png"), Part("text", "right"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="<image> has no file"):
        split_placeholders("<image>", files)


def test_missing_medium_is_rejected() -> None:
    assert find_medium({"0.png": b"x"}, "0.png") == b"x"
    with pytest.raises(DataError, match=r"refers to 1\.png"):
        find_medium({"0.png": b"x"}, "1.png")
