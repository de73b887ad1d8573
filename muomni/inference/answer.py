"""Generate text answers to questions of text, images, and audio."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muomni.data.media.formats import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.text.chat_template import Conversation
from muomni.data.text.turns import MEDIA_KINDS, MediaKind, Part, Turn, split_placeholders
from muomni.data.views.conversation import media_slots
from muomni.errors import ConfigError, DataError
from muomni.inference.load import Assistant
from muomni.models.omni import MediaSlots


@dataclass(frozen=True, slots=True)
class Question:
    """The turns to answer, and the encoded media files by the names used in the turns."""

    turns: tuple[Turn, ...]
    media: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer, its T token ids, and the Thinker's hidden states [1, T, D] for them.

    `stopped` is False if the answer was truncated, by the token limit or a repetition.
    """

    text: str
    ids: list[int]
    hidden: Tensor
    stopped: bool


def read_question(
    text: str | None = None,
    images: Sequence[Path] = (),
    audios: Sequence[Path] = (),
    system: str | None = None,
) -> Question:
    """Build one user turn of text, images, and audio clips, preceded by an optional system turn.

    Each `<image>` and `<audio>` in the text is replaced by the next file of its kind. Files without
    placeholders come before the text, images first.

    Raises:
        ConfigError: the question is empty, or the placeholders do not match the files.
        DataError: a file cannot be read.
    """
    media: dict[str, bytes] = {}
    files: dict[MediaKind, list[str]] = {"image": [], "audio": []}
    for path in images:
        media[str(path)] = _read(path, "image", IMAGE_EXTENSIONS)
        files["image"].append(str(path))
    for path in audios:
        media[str(path)] = _read(path, "audio", AUDIO_EXTENSIONS)
        files["audio"].append(str(path))
    try:
        parts = user_parts(text or "", files)
    except DataError as error:
        raise ConfigError(f"--text does not match the files: {error}") from None
    if not parts:
        raise ConfigError("the question is empty; set --text, --image, or --audio")
    turns = [Turn("user", tuple(parts))]
    if system is not None:
        turns.insert(0, Turn("system", (Part("text", system),)))
    return Question(tuple(turns), media)


def user_parts(text: str, files: dict[MediaKind, list[str]]) -> list[Part]:
    """Put names of files at their placeholders `<image>` and `<audio>`; kinds without placeholders come first.

    Raises DataError if the placeholders do not match the files.
    """
    leading: list[Part] = []
    for kind in MEDIA_KINDS:
        if f"<{kind}>" not in text:
            leading += [Part(kind, name) for name in files[kind]]
            files[kind] = []
    parts = split_placeholders(text, files)
    for kind in MEDIA_KINDS:
        if files[kind]:
            raise DataError(
                f"there are fewer <{kind}> placeholders than files: {files[kind][0]} has none; add one"
            )
    return [*leading, *parts]


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded question, and the length limit of its answer in tokens."""

    encoded: Conversation
    max_new_tokens: int


def encode_question(assistant: Assistant, question: Question, max_new_tokens: int) -> Prompt:
    """Encode a question; raises DataError for broken media or if it exceeds the model's positions."""
    encoded = assistant.encoder.prompt(question.turns, question.media)
    limit = assistant.model.config.thinker.max_positions
    if len(encoded.ids) + max_new_tokens > limit:
        raise DataError(
            f"the question of {len(encoded.ids)} tokens plus {max_new_tokens} new tokens exceeds the "
            f"model's {limit} positions; shorten the question or lower --max-new-tokens"
        )
    return Prompt(encoded, max_new_tokens)


def answer_batch(
    assistant: Assistant,
    prompts: Sequence[Prompt],
    *,
    min_new_tokens: int = 0,
    cut_loops: bool = True,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[Answer]:
    """Answer questions in one left-padded batch; the options are those of `generate_text`.

    The batch runs until its longest answer ends, so batch prompts with similar limits.
    """
    ids, valid = pad_left([prompt.encoded.ids for prompt in prompts], assistant.tokenizer.pad_id)
    ends = range(ids.shape[1], ids.numel() + 1, ids.shape[1])
    offsets = [
        (end - len(prompt.encoded.ids), prompt.encoded)
        for end, prompt in zip(ends, prompts, strict=True)
    ]
    slots = media_slots(offsets, assistant.encoder, ids.numel())
    generated = assistant.model.generate(
        ids.to(assistant.device),
        MediaSlots.of_batch({name: t.to(assistant.device) for name, t in slots.items()}),
        valid=None if valid.all() else valid.to(assistant.device),
        eos_id=assistant.tokenizer.eos_id,
        max_new_tokens=[prompt.max_new_tokens for prompt in prompts],
        min_new_tokens=min_new_tokens,
        cut_loops=cut_loops,
        temperature=temperature,
        generator=generator,
        on_token=on_token,
    )
    return [
        Answer(assistant.tokenizer.decode(text.ids), text.ids, text.hidden, text.stopped)
        for text in generated
    ]


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] that end at the last position, and where they are no padding [B, T] bool."""
    ids = torch.full((len(prompts), max(map(len, prompts))), pad_id)
    valid = torch.zeros(ids.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        valid[row, -len(prompt) :] = True
    return ids, valid


def answer(
    assistant: Assistant,
    question: Question,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    cut_loops: bool = True,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer one question; the options are those of `generate_text`.

    `on_text` receives the answer in pieces as it is generated; a repetition that is cut was part of them.
    Raises DataError for broken media or if the question exceeds the model's positions.
    """
    (generated,) = answer_batch(
        assistant,
        [encode_question(assistant, question, max_new_tokens)],
        min_new_tokens=min_new_tokens,
        cut_loops=cut_loops,
        temperature=temperature,
        generator=generator,
        on_token=None if on_text is None else _TextStream(assistant, on_text),
    )
    return generated


class _TextStream:
    """Decodes the tokens of one answer as they come; incomplete UTF-8 waits for its next byte."""

    def __init__(self, assistant: Assistant, on_text: Callable[[str], None]) -> None:
        self._decode = assistant.tokenizer.decode
        self._on_text = on_text
        self._ids: list[int] = []
        self._num_shown = 0

    def __call__(self, token: Tensor) -> None:
        self._ids.append(int(token))
        text = self._decode(self._ids).rstrip("\N{REPLACEMENT CHARACTER}")
        if len(text) > self._num_shown:
            self._on_text(text[self._num_shown :])
            self._num_shown = len(text)


def _read(path: Path, kind: str, known: tuple[str, ...]) -> bytes:
    if path.suffix.lower().lstrip(".") not in known:
        raise DataError(f"{path} is not a supported {kind} file; use one of {', '.join(known)}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {kind} {path}: {error.strerror}") from None
