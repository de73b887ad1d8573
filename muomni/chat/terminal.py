"""The terminal side of `muomni chat`: reads lines, runs commands, and prints answers as they are generated."""

import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import NamedTuple

from muomni.chat.session import ChatSession
from muomni.data.text.turns import MediaKind, Turn
from muomni.errors import ConfigError, MuomniError, did_you_mean
from muomni.inference.speech import check_can_speak
from muomni.io.paths import absolute

PROMPT = "> "
_MAX_WIDTH = 88
_USAGE_WIDTH = 19


class Command(NamedTuple):
    """A command, with its usage and what it does."""

    usage: str
    summary: str
    run: Callable[[str], None]


class Terminal:
    """A conversation on standard input and output.

    Errors are printed to standard error, and the conversation continues. Without a terminal, standard input
    is read without a prompt.
    """

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._speaks = self._is_done = False
        self._commands = {
            "image": Command("/image PATH", "attach an image to the next turn", self._image),
            "audio": Command("/audio PATH", "attach an audio clip to the next turn", self._audio),
            "speak": Command(
                "/speak [on|off|WAV]",
                "write the last answer as speech to a new file, or to this WAV file; on: each answer",
                self._speak,
            ),
            "history": Command("/history", "show what the model remembers", self._history),
            "reset": Command("/reset", "forget all turns and attachments", self._reset),
            "help": Command("/help", "show the commands", self._help),
            "quit": Command("/quit", "end the conversation (also Ctrl-D)", self._quit),
        }

    def run(self) -> int:
        """Converse until /quit or the end of input; returns the number of failed lines."""
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
        if self.is_interactive:
            self._enable_editing()
            self._note("Type a question. /help lists the commands, /quit ends.")
        num_failed = 0
        while not self._is_done:
            try:
                line = input(PROMPT if self.is_interactive else "").strip()
            except EOFError:
                if self.is_interactive:
                    print()
                break
            except KeyboardInterrupt:
                self._note("\n(/quit or Ctrl-D ends the conversation)")
                continue
            try:
                self._handle(line)
            except MuomniError as error:
                num_failed += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                self._note("\n(stopped; the turn is not remembered)")
        return num_failed

    def _handle(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name not in self._commands:
                known = tuple(f"/{command}" for command in self._commands)
                hint = did_you_mean(f"/{name}", known)
                raise ConfigError(f"unknown command /{name}{hint}; /help lists the commands")
            self._commands[name].run(argument.strip())
        elif line or self.session.attachments:
            self._send(line)

    def _send(self, text: str) -> None:
        num_shown = 0

        def show(piece: str) -> None:
            nonlocal num_shown
            num_shown += len(piece)
            print(_printable(piece), end="", flush=True)

        try:
            reply = self.session.send(text, show)
        except BaseException:
            if num_shown:
                print(flush=True)
            raise
        print(_printable(reply.text[num_shown:]), flush=True)
        for notice in reply.notices:
            self._note(f"({notice})")
        if self._speaks and reply.text.strip():
            self._write_speech(None)

    # -- commands ----------------------------------------------------------------------------------
    def _image(self, argument: str) -> None:
        self._attach("image", argument)

    def _audio(self, argument: str) -> None:
        self._attach("audio", argument)

    def _attach(self, kind: MediaKind, argument: str) -> None:
        if not argument:
            raise ConfigError(f"/{kind} needs a file; type /{kind} PATH")
        attachment = self.session.attach(kind, _path(argument))
        self._note(f"(attached {kind} {attachment.name}: {attachment.facts})")

    def _speak(self, argument: str) -> None:
        if argument in ("on", "off"):
            check_can_speak(self.session.assistant)
            self._speaks = argument == "on"
            self._note(f"(speech is {argument})")
        else:
            self._write_speech(_path(argument) if argument else None)

    def _write_speech(self, path: Path | None) -> None:
        spoken = self.session.speak(path)
        self._note(f"(spoken, {spoken.duration_s:.1f} s: {spoken.path})")

    def _history(self, _argument: str) -> None:
        turns = self.session.turns
        self._note("\n".join(map(_describe, turns)) or "(the history is empty)")

    def _reset(self, _argument: str) -> None:
        self.session.reset()
        self._note("(forgot all turns and attachments)")

    def _help(self, _argument: str) -> None:
        width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
        for command in self._commands.values():
            first = f"{command.usage:<{_USAGE_WIDTH}} "
            print(
                textwrap.fill(
                    command.summary,
                    width,
                    initial_indent=first,
                    subsequent_indent=" " * len(first),
                )
            )
        self._note(
            "Everything else is a question. <image> and <audio> in it mark where files belong."
        )

    def _quit(self, _argument: str) -> None:
        self._is_done = True

    # -- terminal ----------------------------------------------------------------------------------
    def _note(self, text: str) -> None:
        """Print lines, wrapped at words."""
        width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
        # A path must stay in one piece, so that it can be copied.
        wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        for line in _printable(text).split("\n"):
            print(wrapper.fill(line) if self.is_interactive else line, flush=True)

    def _enable_editing(self) -> None:
        with suppress(ImportError):  # Pythons without readline still read lines
            import readline

            readline.set_completer_delims(" ")
            readline.set_completer(self._complete)
            readline.parse_and_bind("tab: complete")

    def _complete(self, word: str, state: int) -> str | None:
        """The completion number `state` of a command or path."""
        import readline

        if readline.get_begidx() == 0:
            found = [f"/{name} " for name in self._commands if f"/{name}".startswith(word)]
        else:
            paths = glob(str(Path(word).expanduser()) + ("/" if word.endswith("/") else "") + "*")
            found = [f"{path}/" if Path(path).is_dir() else path for path in sorted(paths)]
        return found[state] if state < len(found) else None


def _describe(turn: Turn) -> str:
    parts = (
        part.value if part.kind == "text" else f"[{part.kind} {part.value}]" for part in turn.parts
    )
    return f"{turn.role}: {' '.join(parts)}"


def _path(text: str) -> Path:
    """A path as typed, or dropped onto the terminal with quotes or backslashes; raises ConfigError."""
    try:
        path = Path(absolute(text))
        if not path.exists():
            with suppress(ValueError):  # unbalanced quotes are part of the name
                words = shlex.split(text)
                path = Path(absolute(words[0])) if len(words) == 1 else path
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}") from None
    return path


def _printable(text: str) -> str:
    """The text without control characters, which could change the state of the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
