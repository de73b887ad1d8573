"""Answers in conversations: their kind of task, and scores of generated answers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muomni.data.text.normalization import spoken_form
from muomni.data.text.turns import Turn
from muomni.evaluation.metrics.tally import most_common, sum_counts

KINDS = ("caption", "spoken_question", "transcribe", "speak", "text")


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """One answer of a conversation: the turns before it, the reference answer, and the type of the sample."""

    kind: str
    history: tuple[Turn, ...]
    answer: Turn
    type: str = ""

    @property
    def text(self) -> str:
        return " ".join(part.value for part in self.answer.parts if part.kind == "text").strip()

    @property
    def label(self) -> str:
        """What exact matches are reported by: the type that the corpus gives, or else the kind."""
        return self.type or self.kind

    @property
    def audio(self) -> str | None:
        """Name of the audio clip of a spoken answer."""
        return next((part.value for part in self.answer.parts if part.kind == "audio"), None)


def answer_tasks(turns: Sequence[Turn], type: str = "") -> Iterator[AnswerTask]:
    """Yield all answers of a conversation of a type, with their kinds.

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
        yield AnswerTask(kind, history, turn, type)


class FrequentAnswers:
    """Counts training answers; the most frequent one of a type or kind is its blind baseline."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, task: AnswerTask) -> None:
        """Count a training answer."""
        for name in {task.kind, task.label}:
            self._counts[name, task.text] += 1

    def reduce(self) -> dict[str, str]:
        """The most frequent answer by type and by kind, over all ranks; a collective."""
        by_name: dict[str, Counter[str]] = {}
        for (name, text), count in sum_counts(self._counts).items():
            by_name.setdefault(name, Counter())[text] = count
        return {name: text for name in by_name if (text := most_common(by_name[name])) is not None}


def frequent_answer(frequent: dict[str, str], task: AnswerTask) -> str:
    """The most frequent answer of a task's type, or else of its kind; empty without any."""
    return frequent.get(task.label, frequent.get(task.kind, ""))


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
