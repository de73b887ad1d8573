"""A conversation of several turns: history, attachments, limits, and speech."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch

from muomni.chat import attachments, session
from muomni.chat.session import ChatOptions, ChatSession
from muomni.data.text.turns import MediaKind
from muomni.errors import ConfigError, DataError, MuomniError, UpstreamError
from muomni.inference.answer import Answer, Question, answer
from muomni.inference.load import Assistant, load_assistant
from tests.conversations import COLORS, png, tone
from tests.inference.exports import write_sft_export

OPTIONS = ChatOptions(max_new_tokens=8, max_seconds=0.2, speech_temperature=1.0)


@pytest.fixture(scope="module")
def assistant(run: Path) -> Assistant:
    return load_assistant(run, torch.device("cpu"))


@pytest.fixture()
def chat(assistant: Assistant) -> ChatSession:
    return ChatSession(assistant, OPTIONS)


@pytest.fixture()
def say(monkeypatch: pytest.MonkeyPatch, assistant: Assistant) -> Callable[..., None]:
    """Let the model give this answer."""

    def replace(text: str, stopped: bool = True) -> None:
        ids = assistant.tokenizer.encode(text)
        scripted = Answer(text, ids, torch.zeros(1, len(ids), 32), stopped)
        monkeypatch.setattr(session, "answer", lambda *_, **__: scripted)

    return replace


def test_answers_depend_on_all_earlier_turns_and_their_files(
    assistant: Assistant, chat: ChatSession, files: Path
) -> None:
    chat.attach("image", files / "red.png")
    chat.send("the door")
    chat.attach("audio", files / "low.wav")
    chat.attach("image", files / "other" / "red.png")
    reply = chat.send("again")
    *asked, last = chat.turns
    assert [turn.role for turn in chat.turns] == ["user", "assistant", "user", "assistant"]
    assert [part.value for part in asked[2].parts] == ["red (2).png", "low.wav", "again"]
    media = {
        "red.png": png(COLORS["red"]), "red (2).png": png(COLORS["blue"]), "low.wav": tone(200),
    }  # fmt: skip
    expected = answer(assistant, Question(tuple(asked), media), max_new_tokens=8)
    assert reply.text == expected.text == last.parts[0].value


def test_pieces_of_the_answer_are_shown_as_they_are_generated(chat: ChatSession) -> None:
    pieces: list[str] = []
    reply = chat.send("the door", pieces.append)
    assert len(pieces) > 1 and "".join(pieces).startswith(reply.text.rstrip("\ufffd"))


def test_oldest_turns_are_dropped_with_a_notice(
    assistant: Assistant, files: Path, say: Callable[..., None]
) -> None:
    chat = ChatSession(assistant, ChatOptions(system="the", max_new_tokens=200))
    say("red")
    chat.attach("image", files / "red.png")
    assert chat.send("the door").notices == []
    chat.attach("image", files / "blue.png")
    while not (notices := chat.send("the river and the door").notices):
        assert len(chat.turns) < 20
    assert notices == ["the 2 oldest turns were dropped: the model's context has 256 positions"]
    assert [turn.role for turn in chat.turns[:3]] == ["system", "user", "assistant"]
    names = [part.value for turn in chat.turns for part in turn.parts if part.kind == "image"]
    assert names == ["blue.png"] == list(chat._media)


def test_a_turn_that_fails_changes_nothing_but_uses_up_its_attachments(
    chat: ChatSession, files: Path
) -> None:
    chat.send("the door")
    before = chat.turns
    for text, error, message in (
        ("the door " * 200, DataError, r"needs \d+ positions, but the model's 256 .* leave 248"),
        ("<audio>", DataError, "does not match the attached files: <audio> has no file"),
        ("<image>?", DataError, "files: there are fewer <image> placeholders than files"),
    ):
        chat.attach("image", files / "red.png")
        chat.attach("image", files / "blue.png")
        with pytest.raises(error, match=message):
            chat.send(text)
        assert (chat.turns, chat.attachments) == (before, [])
    with pytest.raises(ConfigError, match="the turn is empty"):
        chat.send("  ")
    assert chat.send("again") and len(chat.turns) == 4


def test_an_empty_answer_is_not_remembered(chat: ChatSession, say: Callable[..., None]) -> None:
    say("")
    assert chat.send("the door").notices == [
        "the model answered nothing, so the turn is not remembered; rephrase it"
    ]
    assert chat.turns == ()
    with pytest.raises(ConfigError, match="there is no answer to speak yet"):
        chat.speak()


def test_a_cut_answer_is_reported(chat: ChatSession, say: Callable[..., None]) -> None:
    say("red", stopped=False)
    (notice,) = chat.send("the door").notices
    assert "began to repeat itself" in notice
    say("the door and the river and the door", stopped=False)
    (notice,) = chat.send("the door").notices
    assert "raise --max-new-tokens" in notice


def test_reset_restarts_the_conversation(assistant: Assistant) -> None:
    chat = ChatSession(assistant, ChatOptions(system="the", max_new_tokens=8, temperature=2.0))
    first = chat.send("the door").text
    chat.reset()
    assert [turn.role for turn in chat.turns] == ["system"]
    assert chat.send("the door").text == first


def test_a_single_turn_does_not_see_earlier_ones(assistant: Assistant, files: Path) -> None:
    chat = ChatSession(assistant, ChatOptions(system="the", single_turn=True, max_new_tokens=8))
    for name in ("red", "blue"):
        chat.attach("image", files / f"{name}.png")
        chat.send("the door")
    assert [turn.role for turn in chat.turns] == ["system", "user", "assistant"]
    assert list(chat._media) == ["blue.png"]


def test_options_without_room_for_a_question_are_refused(assistant: Assistant) -> None:
    with pytest.raises(ConfigError, match="--max-new-tokens 254 leaves no room for a question"):
        ChatSession(assistant, ChatOptions(max_new_tokens=254))


def huge_png() -> bytes:
    """A PNG whose header declares 20,000 x 20,000 pixels, which it does not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    size, checksum = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + size + header + checksum


UNUSABLE: list[tuple[MediaKind, str, bytes, str]] = [
    ("image", "notes.png", b"not an image", "notes.png: broken image"),
    ("image", "half.png", png(COLORS["red"])[:60], "half.png: broken image"),
    ("image", "huge.png", huge_png(), "has 20000 x 20000 pixels, but at most 64 million"),
    ("image", "low.wav", tone(200), "low.wav is not a supported image file"),
    ("audio", "empty.wav", tone(200, 0), "empty.wav: audio clip of zero length"),
    ("audio", "text.wav", b"not audio", "text.wav: broken audio clip"),
    ("audio", "long.wav", tone(200, 600, 8000), r"600.0 s long, but .* takes at most 19.4 s"),
    ("audio", "red.png", png(COLORS["red"]), "red.png is not a supported audio file"),
]


@pytest.mark.parametrize(
    ("kind", "name", "data", "message"), UNUSABLE, ids=[row[1] for row in UNUSABLE]
)
def test_an_unusable_file_is_refused_in_one_sentence(
    chat: ChatSession, tmp_path: Path, kind: MediaKind, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        chat.attach(kind, tmp_path / name)
    assert "\n" not in str(raised.value) and chat.attachments == []


def test_files_beyond_a_limit_are_not_decoded(
    chat: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    for name in ("decode_image", "decode_declared_length"):
        monkeypatch.setattr(attachments, name, decode)
    (tmp_path / "huge.png").write_bytes(huge_png())
    (tmp_path / "long.flac").write_bytes(tone(200, 30, kind="FLAC"))
    files: list[tuple[MediaKind, str]] = [("image", "huge.png"), ("audio", "long.flac")]
    for kind, name in files:
        with pytest.raises(DataError, match="at most"):
            chat.attach(kind, tmp_path / name)


def test_files_that_cannot_be_read_are_reported(
    chat: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "big.png").write_bytes(bytes(2 << 20))
    monkeypatch.setattr(chat, "limits", attachments.MediaLimits(32, 1.0, file_bytes=1 << 20))
    for name, message in (
        ("none.png", "cannot read image .*none.png: No such file"),
        ("folder.png", "folder.png is not a file"),
        ("big.png", "big.png is larger than 1 MiB"),
    ):
        with pytest.raises(DataError, match=message):
            chat.attach("image", tmp_path / name)


def test_answers_are_spoken_to_new_files(
    chat: ChatSession, tmp_path: Path, say: Callable[..., None]
) -> None:
    chat._parent = tmp_path
    say("the cat")
    chat.send("the door")
    first, second = chat.speak(), chat.speak()
    assert first.path != second.path and first.path.is_relative_to(tmp_path)
    assert soundfile.info(first.path).duration == pytest.approx(first.duration_s)
    assert chat.speak(tmp_path / "mine.wav").path.is_file()
    errors: list[tuple[Path, type[MuomniError], str]] = [
        (tmp_path / "mine.mp3", ConfigError, "name a file that ends in .wav"),
        (tmp_path / "none" / "mine.wav", ConfigError, "cannot write speech to"),
    ]
    for path, error, message in errors:
        with pytest.raises(error, match=message):
            chat.speak(path)


def test_a_model_without_talker_chats_but_does_not_speak(tmp_path: Path) -> None:
    write_sft_export(tmp_path, with_talker=False)
    chat = ChatSession(load_assistant(tmp_path, torch.device("cpu")), OPTIONS)
    chat.send("the door")
    with pytest.raises(UpstreamError, match="has no Talker and cannot speak"):
        chat.speak()
