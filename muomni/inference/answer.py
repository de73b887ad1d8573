"""Answers a question of text, images and audio clips with text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muomni.data.media.decode import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.text.chat_template import Conversation
from muomni.data.text.turns import MEDIA_KINDS, MediaKind, Part, Turn, split_placeholders
from muomni.data.views.conversation import media_slots
from muomni.errors import ConfigError, DataError
from muomni.inference.load import Assistant
from muomni.models.omni import MediaSlots


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks: turns, and the bytes of the media that they name."""

    turns: tuple[Turn, ...]
    media: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer, its token ids and the Thinker's states [1, T, D] at them.

    `stopped` is False when it was cut: at the limit of tokens, or since it repeated itself.
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
    """One user turn of text, images and audio clips, as the training data has them.

    Each `<image>` and `<audio>` in the text stands for the next file of its kind; images, then
    audio clips, that have none come before the text. Raises ConfigError when there is nothing to ask or
    placeholders and files do not fit, DataError for a file that cannot be read.
    """
    media: dict[str, bytes] = {}
    files: dict[MediaKind, list[str]] = {"image": [], "audio": []}
    for path in images:
        media[str(path)] = _read(path, "image", IMAGE_EXTENSIONS)
        files["image"].append(str(path))
    for path in audios:
        media[str(path)] = _read(path, "audio", AUDIO_EXTENSIONS)
        files["audio"].append(str(path))
    parts = _parts(text or "", files)
    if not parts:
        raise ConfigError("there is nothing to answer; give --text, --image or --audio")
    turns = [Turn("user", tuple(parts))]
    if system is not None:
        turns.insert(0, Turn("system", (Part("text", system),)))
    return Question(tuple(turns), media)


def _parts(text: str, files: dict[MediaKind, list[str]]) -> list[Part]:
    """Put files where the text has placeholders; kinds that have none come first."""
    first: list[Part] = []
    for kind in MEDIA_KINDS:
        if f"<{kind}>" not in text:
            first += [Part(kind, name) for name in files[kind]]
            files[kind] = []
    try:
        placed = split_placeholders(text, files)
    except DataError as error:
        raise ConfigError(f"--text does not fit the files: {error}") from None
    for kind in MEDIA_KINDS:
        if files[kind]:
            raise ConfigError(
                f"--text has fewer <{kind}> than there are files: {files[kind][0]} is left over"
            )
    return [*first, *placed]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model reads it, and how long its answer may become."""

    encoded: Conversation
    max_new_tokens: int


def encode_question(assistant: Assistant, question: Question, max_new_tokens: int) -> Prompt:
    """Raises DataError for a broken medium or a question longer than the model's positions."""
    encoded = assistant.encoder.prompt(question.turns, question.media)
    limit = assistant.model.config.thinker.max_positions
    if len(encoded.ids) + max_new_tokens > limit:
        raise DataError(
            f"the question takes {len(encoded.ids)} positions, and with {max_new_tokens} new tokens more "
            f"than the model's {limit}; ask with less media or text, or lower --max-new-tokens"
        )
    return Prompt(encoded, max_new_tokens)


def answer_together(
    assistant: Assistant,
    prompts: Sequence[Prompt],
    *,
    min_new_tokens: int = 0,
    cut_loops: bool = True,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Answer]:
    """Answer several questions in one batch; options as those of `OmniModel.generate`.

    The batch takes as long as its longest answer, so put together what has like limits.
    """
    width = max(len(prompt.encoded.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), assistant.tokenizer.pad_id)
    valid = torch.zeros(ids.shape, dtype=torch.bool)
    placed = []
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.encoded.ids)
        ids[row, start:] = torch.tensor(prompt.encoded.ids)
        valid[row, start:] = True
        placed.append((row * width + start, prompt.encoded))
    slots = media_slots(placed, assistant.encoder, ids.numel())
    made = assistant.model.generate(
        ids.to(assistant.device),
        MediaSlots.of_batch({name: t.to(assistant.device) for name, t in slots.items()}),
        valid=None if valid.all() else valid.to(assistant.device),
        eos_id=assistant.tokenizer.eos_id,
        max_new_tokens=[prompt.max_new_tokens for prompt in prompts],
        min_new_tokens=min_new_tokens,
        cut_loops=cut_loops,
        temperature=temperature,
        generator=generator,
    )
    return [
        Answer(assistant.tokenizer.decode(text.ids), text.ids, text.hidden, text.stopped)
        for text in made
    ]


def answer(
    assistant: Assistant,
    question: Question,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    cut_loops: bool = True,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Answer:
    """Generate an answer of at most so many tokens; options as those of `OmniModel.generate`.

    Raises DataError for a broken medium or a question that is longer than the model's positions.
    """
    (made,) = answer_together(
        assistant,
        [encode_question(assistant, question, max_new_tokens)],
        min_new_tokens=min_new_tokens,
        cut_loops=cut_loops,
        temperature=temperature,
        generator=generator,
    )
    return made


def _read(path: Path, kind: str, known: tuple[str, ...]) -> bytes:
    if path.suffix.lower().lstrip(".") not in known:
        raise DataError(f"{path} is no {kind} file that can be read; give {', '.join(known)}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {kind} {path}: {error.strerror}") from None
