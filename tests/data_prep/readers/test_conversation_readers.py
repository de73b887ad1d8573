"""Readers of conversations: positions of media, roles, groups, and bad records."""

import json
from pathlib import Path

import pytest

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers.messages import read_openai
from data_prep.readers.placeholders import read_sharegpt
from muomni.data.text.turns import Part
from muomni.errors import DataError
from tests.data_prep.corpus_files import write_file, write_jsonl

OPTIONS = ReaderOptions()


def _parts(item: Item, turn: int) -> list[tuple[str, str]]:
    return [
        (part.kind, part.value if part.kind == "text" else Path(part.value).name)
        for part in item.turns[turn].parts
    ]


def _reasons(items: list[Item]) -> list[str]:
    return [item.problem.reason if item.problem else "" for item in items]


def _message(item: Item) -> str:
    return item.problem.message if item.problem else ""


def test_sharegpt_with_several_media_in_several_turns(tmp_path: Path) -> None:
    record = {
        "id": "7",
        "system": "Be short.",
        "conversations": [
            {"from": "human", "value": "<image><audio>Compare <image>"},
            {"from": "gpt", "value": "Same."},
            {"from": "human", "value": "And <audio>?"},
            {"from": "gpt", "value": "Other."},
        ],
        "images": ["a.png", "b.png"],
        "audios": ["1.wav", "2.wav"],
    }
    (item,) = read_sharegpt(write_file(tmp_path / "c.json", json.dumps([record])), OPTIONS)
    assert [turn.role for turn in item.turns] == ["system", *["user", "assistant"] * 2]
    assert _parts(item, 1) == [
        *(("image", "a.png"), ("audio", "1.wav")),
        *(("text", "Compare"), ("image", "b.png")),
    ]
    assert _parts(item, 3) == [("text", "And"), ("audio", "2.wav"), ("text", "?")]
    assert (item.key, item.group) == ("7", "picture:a")  # terms: allow


def test_sharegpt_json_lines_with_roles(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A cat."},
    ]
    records = [{"messages": messages, "images": ["a.png"]}]
    (item,) = read_sharegpt(write_jsonl(tmp_path / "c.jsonl", records), OPTIONS)
    assert _parts(item, 0) == [("image", "a.png"), ("text", "What?")]
    assert item.turns[1].role == "assistant"
    assert item.key == "c-00000001"


def test_sharegpt_bad_records(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    records = [
        {"id": "no file", "conversations": turns},
        {"id": "two for one", "conversations": turns, "images": ["a.png", "b.png"]},
        {"id": "video", "conversations": turns, "videos": ["a.mp4"]},
        {"id": "tool", "conversations": [{"from": "function_call", "value": "{}"}]},
        {"id": "none"},
        {"id": "good", "conversations": turns, "images": ["a.png"]},
        "no object",
    ]
    path = write_file(tmp_path / "c.json", json.dumps(records))
    assert _reasons(list(read_sharegpt(path, OPTIONS))) == [*["bad-record"] * 5, "", "bad-record"]
    lines = write_file(tmp_path / "c.jsonl", "{broken\n")
    assert _reasons(list(read_sharegpt(lines, OPTIONS))) == ["bad-record"]
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        list(read_sharegpt(tmp_path / "none.json", OPTIONS))
    with pytest.raises(DataError, match="cannot read the ShareGPT file"):
        list(read_sharegpt(write_file(tmp_path / "d.json", "[{"), OPTIONS))


def _openai(path: Path, *contents: object) -> list[Item]:
    records = [
        {
            "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            ]
        }
        for content in contents
    ]
    return list(read_openai(write_jsonl(path, records), ReaderOptions(media_root=Path("/media"))))


def test_openai_parts(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": f"file://{tmp_path}/b%20c.png"},
        {"type": "input_audio", "input_audio": {"data": "q.wav", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": "r.mp3"}},
    ]
    (item,) = _openai(tmp_path / "c.jsonl", content)
    assert [turn.role for turn in item.turns] == ["system", "user", "assistant"]
    assert item.turns[1].parts == (
        Part("text", "Look:"),
        Part("image", "/media/a.png"),
        Part("image", f"{tmp_path}/b c.png"),
        Part("audio", "/media/q.wav"),
        Part("audio", "/media/r.mp3"),
    )
    assert item.group == "picture:a"  # terms: allow


def test_openai_bad_records(tmp_path: Path) -> None:
    items = _openai(
        tmp_path / "c.jsonl",
        [{"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}],
        [{"type": "image_url", "image_url": {"url": "data:image/png,iVBO"}}],
        [{"type": "image_url"}],
        [{"type": "video_url", "video_url": {"url": "a.mp4"}}],
        None,
        "good",
    )
    assert _reasons(items) == [*["bad-record"] * 4, "empty-text", ""]
    assert "'image_url' is an address, not a local file: 'https://x" in _message(items[0])
    records = [{"messages": [{"role": "critic", "content": "x"}]}, {}, 3]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    assert _reasons(list(read_openai(path, OPTIONS))) == ["bad-record"] * 3
