"""What the demo shows for a question, and how it refuses to start; no browser and no Gradio."""

import socket
import sys
from pathlib import Path

import pytest
import torch

from muomni.chat.session import ChatOptions, ChatSession
from muomni.chat.web import Conversation, answer_question
from muomni.cli.main import main
from muomni.inference.load import load_assistant


@pytest.fixture()
def conversation(run: Path, tmp_path: Path) -> Conversation:
    options = ChatOptions(max_new_tokens=16, max_seconds=0.2)
    assistant = load_assistant(run, torch.device("cpu"))
    return Conversation(ChatSession(assistant, options, tmp_path))


def test_question_answer_and_speech_are_shown(conversation: Conversation, files: Path) -> None:
    image = files / "red.png"
    assert answer_question(conversation, "the door", [str(image)], speaks=True)
    *texts, (role, speech) = conversation.shown
    assert texts == [("user", image), ("user", "the door"), ("assistant", "red")]
    assert role == "assistant" and Path(speech).read_bytes()[:4] == b"RIFF"


def test_an_unusable_upload_is_one_line_and_the_next_question_is_answered(
    conversation: Conversation, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    uploads = {
        files / "broken.png": "broken.png: broken image",
        files / "empty.wav": "empty.wav: audio clip of zero length",
        files
        / "long.wav": "long.wav: the audio clip is 600.0 s long, but this model takes at most 18.8 s",
        tmp_path / "notes.txt": "notes.txt is neither an image nor an audio file",
        tmp_path / "gone.png": "cannot read image",
    }
    for upload, message in uploads.items():
        good = str(files / "red.png")
        assert not answer_question(conversation, "the door", [good, str(upload)], speaks=False)
        ((role, line),) = conversation.shown
        assert role == "assistant" and f"(not sent: {message}" in str(line)
        conversation.shown.clear()
    assert answer_question(conversation, "the door", [str(files / "blue.png")], speaks=False)
    assert conversation.shown[-1] == ("assistant", "blue")


def test_a_failure_to_speak_keeps_the_answer(
    conversation: Conversation, files: Path, tmp_path: Path
) -> None:
    conversation.session._parent = tmp_path / "gone"
    assert answer_question(conversation, "the door", [str(files / "red.png")], speaks=True)
    answer, line = conversation.shown[-2:]
    assert answer == ("assistant", "red") and "(not spoken: cannot create a folder" in str(line[1])


def test_missing_extra_and_port_in_use_are_one_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        main(["demo"])
    expected = "muomni demo: the package gradio is missing; run pip install 'muomni[demo]'\n"
    assert (stop.value.code, capsys.readouterr().err) == (7, expected)
    monkeypatch.setattr("muomni.cli.demo.find_spec", lambda _: "installed")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for host in ("127.0.0.1", "no.such.host.invalid"):
            with pytest.raises(SystemExit) as stop:
                main(["demo", "--host", host, "--port", port])
            errors = capsys.readouterr().err
            assert stop.value.code == 2 and errors.count("\n") == 1
            assert f"cannot listen on {host}:{port}" in errors and "choose another --port" in errors
