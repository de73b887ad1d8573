"""Kinds of answer tasks, and scores computed by hand."""

import pytest

from muomni.data.text.turns import Part, PartKind, Turn
from muomni.evaluation.metrics.answer_tasks import answer_tasks, is_exact, token_f1

IMAGE, AUDIO, TEXT = Part("image", "0.png"), Part("audio", "0.wav"), Part("text", "hello")


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ((IMAGE, TEXT), (TEXT,), "caption"),
        ((IMAGE, AUDIO), (TEXT,), "spoken_question"),
        ((AUDIO, TEXT), (TEXT,), "transcribe"),
        ((TEXT,), (TEXT, AUDIO), "speak"),
        ((TEXT,), (TEXT,), "text"),
    ],
)
def test_kind_follows_from_media(
    question: tuple[Part, ...], answer: tuple[Part, ...], kind: str
) -> None:
    (task,) = answer_tasks([Turn("user", question), Turn("assistant", answer)])
    assert (task.kind, task.text) == (kind, "hello")
    assert task.audio == ("0.wav" if kind == "speak" else None)


def test_each_answer_is_a_task_with_its_history() -> None:
    turns = [
        Turn("system", (TEXT,)),
        Turn("user", (TEXT,)),
        Turn("assistant", (TEXT,)),
        Turn("user", (IMAGE,)),
        Turn("assistant", (TEXT,)),
    ]
    first, second = answer_tasks(turns)
    assert (first.kind, len(first.history)) == ("text", 2)
    assert (second.kind, len(second.history)) == ("caption", 4)


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("a red car", "A red car!", 1.0),
        ("a red car", "a blue car", 2 * 2 / 6),
        ("the the cat", "the dog", 2 * 1 / 5),  # repeated words match at most as often as in both
        ("a red car", "", 0.0),
        ("...", "", 1.0),
    ],
)
def test_token_f1_by_hand(reference: str, answer: str, expected: float) -> None:
    assert token_f1(reference, answer) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "is_correct"), [("audio", True), ("text", False)])
def test_only_transcripts_ignore_case_and_punctuation(kind: PartKind, is_correct: bool) -> None:
    turns = [Turn("user", (Part(kind, "x"),)), Turn("assistant", (Part("text", "Hold time."),))]
    (task,) = answer_tasks(turns)
    assert is_exact(task, "Hold time.")
    assert is_exact(task, "hold time") is is_correct
    assert not is_exact(task, "hold the time.")
