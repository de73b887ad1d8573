"""`muomni chat`: commands, errors, piped lines, and a real terminal."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muomni.cli.main import main

LIMITS = ["--max-new-tokens", "16", "--max-seconds", "0.2"]
Converse = Callable[..., tuple[str, str, object]]


@pytest.fixture()
def converse(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Converse:
    """Pipe lines into `muomni chat`; returns its output, errors, and exit code."""

    def pipe(*lines: str, options: tuple[str, ...] = ()) -> tuple[str, str, object]:
        text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # the verb replaces it
        code: object = 0
        try:
            main(["chat", "--run", str(run), *LIMITS, *options])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return captured.out, captured.err, code

    return pipe


def test_turns_with_files_and_history(converse: Converse, files: Path) -> None:
    output, errors, code = converse(
        f"/image {files}/red.png", "the door", f"/image '{files}/blue.png'", f"/audio {files}/low.wav",
        "the door", "/history", "/reset", "/history", "/quit", "the door",
    )  # fmt: skip
    assert (errors, code) == ("", 0)
    assert output.splitlines() == [
        "(attached image red.png: 40 x 40, which the model sees at 32 x 32)",
        "red",
        "(attached image blue.png: 40 x 40, which the model sees at 32 x 32)",
        "(attached audio low.wav: 0.4 s)",
        "blue",
        "user: [image red.png] the door",
        "assistant: red",
        "user: [image blue.png] [audio low.wav] the door",
        "assistant: blue",
        "(forgot all turns and attachments)",
        "(the history is empty)",
    ]


def test_answers_are_spoken_to_files(converse: Converse, files: Path, tmp_path: Path) -> None:
    wav = tmp_path / "my answer.wav"
    output, errors, code = converse(
        "/speak on", f"/image {files}/red.png", "the door", "/speak off", f"/speak {wav}", "/speak"
    )
    assert (errors, code) == ("", 0)
    first, mine, last = re.findall(r"\(spoken, 0\.\d s: (.*)\)", output)
    assert mine == str(wav) and first != last
    assert all(Path(path).read_bytes()[:4] == b"RIFF" for path in (first, mine, last))


def test_errors_are_one_line_each_and_set_the_exit_code(converse: Converse, files: Path) -> None:
    output, errors, code = converse(
        "/hlp", "/speak", "/speak a.mp3", "/image", "/image \0.png", "/image ~nobody-here/a.png",
        f"/image {files}/broken.png", f"/audio {files}/empty.wav", f"/audio {files}/long.wav",
        "the door " * 300, "\udcff", f"/image {files}/red.png", "the door",
    )  # fmt: skip
    messages = [
        "unknown command /hlp (did you mean '/help'?); /help lists the commands",
        "there is no answer to speak yet; ask something first",
        "there is no answer to speak yet",
        "/image needs a file; type /image PATH",
        "this is not a path",
        "the home folder of ~nobody-here is unknown",
        "broken.png: broken image",
        "empty.wav: audio clip of zero length",
        "long.wav: the audio clip is 600.0 s long, but this model takes at most 18.8 s",
        "send a shorter text or fewer and shorter files",
    ]
    lines = errors.splitlines()
    assert len(lines) == len(messages) and code == 1
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("error: ") and message in line
    assert output.splitlines()[-1] == "red"


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    converse: Converse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from muomni.chat.session import ChatSession, Reply

    def send(_session: ChatSession, _text: str, on_text: Callable[[str], None]) -> Reply:
        on_text("a\x1b[2J")
        return Reply("a\x1b[2Jb")

    monkeypatch.setattr(ChatSession, "send", send)
    assert converse("the door")[0] == "a\ufffd[2Jb\n"


def test_closed_streams_end_the_conversation_with_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for stdin, stdout, message in (
        (None, sys.stdout, "standard input is closed"),
        (io.TextIOWrapper(io.BytesIO(b"the door\nthe door\n")), None, "output is closed"),
        (io.TextIOWrapper(io.BytesIO(b"the door\nthe door\n")), os.fdopen(writer, "w"), "Broken pipe"),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", stdout)
            main(["chat", "--run", str(run), *LIMITS])
        errors = capsys.readouterr().err
        assert stop.value.code and message in errors and errors.count("\n") == 1


class PseudoTerminal:
    """A command in a terminal of 40 columns, without HOME."""

    def __init__(self, *command: str) -> None:
        # Without an open device, as before the command opens it, reading the screen would fail.
        self.screen, terminal = self.files = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "COLUMNS")}
        # Opening the device makes it the controlling terminal, so that Ctrl-C arrives.
        shell = 'exec "$@" <"$0" >"$0" 2>&1'
        self.process = subprocess.Popen(
            ["sh", "-c", shell, os.ttyname(terminal), *command],
            env=environment | {"TERM": "xterm"},
            start_new_session=True,
        )
        self.text = ""

    def wait_for(self, text: str, timeout_s: float = 180) -> str:
        """Read until `text` appears; returns what came before and forgets it."""
        end = time.monotonic() + timeout_s
        while text not in self.text:
            ready, _, _ = select.select([self.screen], [], [], 0.5)
            is_alive = self.process.poll() is None and time.monotonic() < end
            assert ready or is_alive, f"no {text!r} in {self.text!r}"
            self.text += os.read(self.screen, 4096).decode() if ready else ""
        before, _, self.text = self.text.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())


@pytest.fixture()
def terminal(run: Path) -> Iterator[PseudoTerminal]:
    started = PseudoTerminal(sys.executable, "-m", "muomni.cli", "chat", "--run", str(run), *LIMITS)
    yield started
    started.process.kill()
    started.process.wait()
    for file in started.files:
        os.close(file)


def test_a_narrow_terminal_with_line_editing(terminal: PseudoTerminal, files: Path) -> None:
    left = "\x1b[D"
    terminal.wait_for("> ")
    terminal.type(f"/hlp{left}{left}e\r")  # inserted before "lp"
    help_text = terminal.wait_for("belong.")
    assert "/image PATH" in help_text
    assert all(len(line) <= 40 for line in help_text.splitlines()[2:])
    terminal.wait_for("> ")
    terminal.type("the do")
    terminal.wait_for("the do")
    time.sleep(0.5)  # Python would miss a SIGINT between showing keys and waiting for the next one
    terminal.type("\x03")  # drops the line
    terminal.wait_for("ends the conversation)")
    terminal.wait_for("> ")
    terminal.type(f"/im\t{files}/re\t\r")
    terminal.wait_for("(attached image red.png")
    terminal.wait_for("> ")
    terminal.type("the door\r")
    terminal.wait_for("\nred\r\n> ")
    terminal.type("/his\t\r")
    terminal.wait_for("user: [image red.png] the door")
    terminal.wait_for("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(60) == 0
