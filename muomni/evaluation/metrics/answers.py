"""Answers of conversations: what kind of task each is, and how near a text comes to the right one."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muomni.data.text.ctc_units import spoken_form
from muomni.data.text.turns import Turn

# By the media that an answer follows or holds.
KINDS = ("caption", "spoken_question", "transcribe", "speak", "text")


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """One answer of a conversation: all turns before it, and the right one."""

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
    """All answers of a conversation with their kinds.

    Images asked about in text give `caption`, by an audio clip `spoken_question`; audio clips alone
    give `transcribe`, a spoken answer `speak`, and no medium at all `text`.
    """
    for place, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        history = tuple(turns[:place])
        seen = {part.kind for one in history for part in one.parts if one.role != "assistant"}
        if any(part.kind == "audio" for part in turn.parts):
            kind = "speak"
        elif "image" in seen:
            kind = "spoken_question" if "audio" in seen else "caption"
        else:
            kind = "transcribe" if "audio" in seen else "text"
        yield AnswerTask(kind, history, turn)


def is_exact(task: AnswerTask, answer: str) -> bool:
    """Whether an answer is the right one to the character; of transcripts, the words of it, as for WER:
    an audio clip does not tell case and punctuation."""
    if task.kind == "transcribe":
        return spoken_form(answer) == spoken_form(task.text)
    return answer == task.text


def token_f1(reference: str, answer: str) -> float:
    """F1 of the words of an answer as a bag, without case and punctuation (as SQuAD scores them,
    Rajpurkar et al. 2016, arXiv:1606.05250); 1 when both have no word."""
    right, given = spoken_form(reference).split(), spoken_form(answer).split()
    num_shared = sum((Counter(right) & Counter(given)).values())
    if not right and not given:
        return 1.0
    return 2 * num_shared / (len(right) + len(given))
