"""Answers in conversations: their kind of task, and scores of generated answers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muomni.data.text.normalization import spoken_form
from muomni.data.text.turns import Turn

KINDS = ("caption", "spoken_question", "transcribe", "speak", "text")


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """One answer of a conversation: the turns before it, and the reference answer."""

    kind: str
    history: tuple[Turn, ...]
    answer: Turn

    @property
    def text(self) -> str:
        return " ".join(part.value for part in self.answer.parts if part.kind == "text").strip()

    @property
    def audio(self) -> str | None:
        """Name of the audio clip of a spoken answer."""
        return next((part.value for part in self.answer.parts if part.kind == "audio"), None)


def answer_tasks(turns: Sequence[Turn]) -> Iterator[AnswerTask]:
    """Yield all answers of a conversation, with their kinds.

    The kind follows from the media: `caption` (an image and text), `spoken_question` (an image and
    audio), `transcribe` (audio only), `speak` (a spoken answer), or `text` (no media).
    """
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        history = tuple(turns[:index])
        seen = {part.kind for one in history for part in one.parts if one.role != "assistant"}
        if any(part.kind == "audio" for part in turn.parts):
            kind = "speak"
        elif "image" in seen:
            kind = "spoken_question" if "audio" in seen else "caption"
        else:
            kind = "transcribe" if "audio" in seen else "text"
        yield AnswerTask(kind, history, turn)


def is_exact(task: AnswerTask, answer: str) -> bool:
    """Whether an answer equals the reference.

    Transcripts are compared by words, as for WER, since audio has no case or punctuation.
    """
    if task.kind == "transcribe":
        return spoken_form(answer) == spoken_form(task.text)
    return answer == task.text


def token_f1(reference: str, answer: str) -> float:
    """F1 of the bags of words, without case and punctuation; 1 if both are empty.

    As in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).
    """
    expected, answered = spoken_form(reference).split(), spoken_form(answer).split()
    num_shared = sum((Counter(expected) & Counter(answered)).values())
    if not expected and not answered:
        return 1.0
    return 2 * num_shared / (len(expected) + len(answered))
