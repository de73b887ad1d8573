"""A conversation of several turns with an omni model, independent of how it is displayed.

Every error is a `MuomniError` of one sentence, after which the conversation continues where it was.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from muomni.chat.attachments import Attachment, MediaLimits, read_attachment
from muomni.config.models import SAMPLE_RATE_HZ, SPEECH_TEMPERATURE
from muomni.data.text.turns import MediaKind, Part, Turn
from muomni.errors import ConfigError, DataError
from muomni.inference.answer import Answer, Question, answer, user_parts
from muomni.inference.load import Assistant
from muomni.inference.speech import check_can_speak, speak_answer, write_speech


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to answer; a temperature of 0 is greedy decoding.

    With `single_turn`, an answer does not take earlier turns into account.
    """

    system: str | None = None
    single_turn: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    speech_temperature: float = SPEECH_TEMPERATURE
    max_seconds: float = 30.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of an answer, and what the user should know about it, one sentence each."""

    text: str
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SpokenFile:
    """A WAV file of an answer."""

    path: Path
    duration_s: float


class ChatSession:
    """Turns, attachments, and the last answer of one conversation.

    Speech goes to a new folder in `folder`, by default that of temporary files. Not safe for use by several
    threads at once. Raises ConfigError if the options leave no room for a question.
    """

    def __init__(
        self, assistant: Assistant, options: ChatOptions, folder: Path | None = None
    ) -> None:
        self.assistant, self.options = assistant, options
        self.limits = MediaLimits.of(assistant.model.config, options.max_new_tokens)
        self._generator = torch.Generator(assistant.device)
        self._parent = folder
        self._folder: Path | None = None
        self._num_spoken = 0
        self.reset()
        num_positions = self._num_positions(self._turns, {})
        if num_positions + options.max_new_tokens >= self._max_positions:
            raise ConfigError(
                f"--max-new-tokens {options.max_new_tokens} leaves no room for a question: the model has "
                f"{self._max_positions} positions, and the system prompt and markers take {num_positions}; "
                f"lower it or shorten --system"
            )

    def reset(self) -> None:
        """Forget all turns and attachments, and restart the random numbers."""
        self._turns = self._system_turns()
        self._media: dict[str, bytes] = {}
        self.attachments: list[Attachment] = []
        self._answer: Answer | None = None
        self._generator.manual_seed(self.options.seed)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns that the next answer takes into account."""
        return tuple(self._turns)

    def attach(self, kind: MediaKind, path: Path) -> Attachment:
        """Attach a file to the next turn; raises DataError as `read_attachment` does."""
        attachment = read_attachment(kind, path, self.limits)
        self.attachments.append(attachment)
        return attachment

    def send(self, text: str, on_text: Callable[[str], None] | None = None) -> Reply:
        """Answer a user turn of the text and the attached files, which are used up even if it fails.

        `on_text` as in `muomni.inference.answer.answer`.

        Raises:
            ConfigError: the turn is empty.
            DataError: the turn exceeds the context, or its placeholders do not match its files.
        """
        attachments, self.attachments = self.attachments, []
        earlier, media = list(self._turns), dict(self._media)
        if self.options.single_turn:
            earlier, media = self._system_turns(), {}
        files: dict[MediaKind, list[str]] = {"image": [], "audio": []}
        for attachment in attachments:
            name = _unique(attachment.name, media)
            media[name] = attachment.data
            files[attachment.kind].append(name)
        try:
            parts = user_parts(text, files)
        except DataError as error:
            raise DataError(f"the text does not match the attached files: {error}") from None
        if not parts:
            raise ConfigError("the turn is empty; type a question or attach a file")
        turns, notices = self._within_context([*earlier, Turn("user", tuple(parts))], media)
        options = self.options
        generated = answer(
            self.assistant,
            Question(tuple(turns), media),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            generator=self._generator,
            on_text=on_text,
        )
        notices += self._remarks(generated)
        if self.assistant.tokenizer.encode(generated.text):
            turns.append(Turn("assistant", (Part("text", generated.text),)))
            used = {part.value for turn in turns for part in turn.parts if part.kind != "text"}
            self._turns = turns
            self._media = {name: data for name, data in media.items() if name in used}
            self._answer = generated
        return Reply(generated.text, notices)

    def speak(self, path: Path | None = None) -> SpokenFile:
        """Write the last answer as speech, by default to a new file in a temporary folder.

        Raises:
            UpstreamError: the model has no Talker.
            ConfigError: there is no answer yet, or the file cannot be written.
            DataError: the Talker generates no speech.
        """
        check_can_speak(self.assistant)
        if self._answer is None:
            raise ConfigError("there is no answer to speak yet; ask something first")
        if path is not None and path.suffix.lower() != ".wav":
            raise ConfigError(
                f"speech is written as WAV; name a file that ends in .wav, not {path}"
            )
        options = self.options
        speech = speak_answer(
            self.assistant,
            self._answer,
            max_seconds=options.max_seconds,
            temperature=options.speech_temperature,
            seed=options.seed,
        )
        if path is None:
            path = self._next_file()
        write_speech(path, speech)
        return SpokenFile(path, len(speech.waveform) / SAMPLE_RATE_HZ)

    # -- context -----------------------------------------------------------------------------------
    def _system_turns(self) -> list[Turn]:
        system = self.options.system
        return [Turn("system", (Part("text", system),))] if system else []

    @property
    def _max_positions(self) -> int:
        return self.assistant.model.config.thinker.max_positions

    def _num_positions(self, turns: list[Turn], media: dict[str, bytes]) -> int:
        return self.assistant.encoder.num_prompt_positions(turns, media)

    def _within_context(
        self, turns: list[Turn], media: dict[str, bytes]
    ) -> tuple[list[Turn], list[str]]:
        """Drop the oldest turns that do not fit; the system prompt and the last turn stay."""
        system = [turn for turn in turns if turn.role == "system"]
        others = turns[len(system) :]
        available = self._max_positions - self.options.max_new_tokens
        num_dropped = 0
        while (needed := self._num_positions([*system, *others], media)) > available:
            if len(others) == 1:
                raise DataError(
                    f"the turn needs {needed} positions, but the model's {self._max_positions} positions minus "
                    f"{self.options.max_new_tokens} for the answer leave {available}; send a shorter text or "
                    f"fewer and shorter files"
                )
            del others[:2]  # a question and its answer
            num_dropped += 2
        if not num_dropped:
            return [*system, *others], []
        return [*system, *others], [
            f"the {num_dropped} oldest turns were dropped: the model's context has {self._max_positions} "
            f"positions"
        ]

    def _remarks(self, generated: Answer) -> list[str]:
        if not self.assistant.tokenizer.encode(generated.text):
            return ["the model answered nothing, so the turn is not remembered; rephrase it"]
        if generated.stopped:
            return []
        if len(generated.ids) >= self.options.max_new_tokens:
            return [
                f"the answer was cut at {len(generated.ids)} tokens; raise --max-new-tokens for more"
            ]
        return ["the answer was cut where it began to repeat itself"]

    def _next_file(self) -> Path:
        try:
            if self._folder is None or not self._folder.is_dir():
                self._folder = Path(tempfile.mkdtemp(prefix="muomni_chat_", dir=self._parent))
        except OSError as error:
            raise ConfigError(
                f"cannot create a folder for speech ({error.strerror}); name a WAV file, or set TMPDIR"
            ) from None
        self._num_spoken += 1
        return self._folder / f"answer_{self._num_spoken}.wav"


def _unique(name: str, taken: dict[str, bytes]) -> str:
    """A name that no file of the conversation has."""
    path, number, unique = Path(name), 1, name
    while unique in taken:
        number += 1
        unique = f"{path.stem} ({number}){path.suffix}"
    return unique
