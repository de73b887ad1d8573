"""Kinds of tasks and scores of answers by hand."""

import pytest

from muomni.data.text.turns import Part, Turn
from muomni.evaluation.metrics.answers import answer_tasks, is_exact, token_f1

IMAGE, AUDIO, TEXT = Part("image", "0.png"), Part("audio", "0.wav"), Part("text", "hello")


@pytest.mark.parametrize(
    ("asked", "answered", "kind"),
    [
        ((IMAGE, TEXT), (TEXT,), "caption"),
        ((IMAGE, AUDIO), (TEXT,), "spoken_question"),
        ((AUDIO, TEXT), (TEXT,), "transcribe"),
        ((TEXT,), (TEXT, AUDIO), "speak"),
        ((TEXT,), (TEXT,), "text"),
    ],
)
def test_the_kind_follows_from_the_media(
    asked: tuple[Part, ...], answered: tuple[Part, ...], kind: str
) -> None:
    (task,) = answer_tasks([Turn("user", asked), Turn("assistant", answered)])
    assert (task.kind, task.text) == (kind, "hello")
    assert task.audio == ("0.wav" if kind == "speak" else None)


def test_each_answer_of_a_conversation_is_a_task_with_all_before_it() -> None:
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
    ("reference", "given", "expected"),
    [
        ("a red car", "A red car!", 1.0),
        ("a red car", "a blue car", 2 * 2 / 6),
        ("the the cat", "the dog", 2 * 1 / 5),  # a word counts as often as both have it
        ("a red car", "", 0.0),
        ("...", "", 1.0),
    ],
)
def test_word_f1(reference: str, given: str, expected: float) -> None:
    assert token_f1(reference, given) == pytest.approx(expected)


@pytest.mark.parametrize(("media", "is_right"), [("audio", True), ("text", False)])
def test_transcripts_need_no_punctuation_but_copies_do(media: str, is_right: bool) -> None:
    turns = [Turn("user", (Part(media, "x"),)), Turn("assistant", (Part("text", "Hold time."),))]
    (task,) = answer_tasks(turns)
    assert is_exact(task, "Hold time.")
    assert is_exact(task, "hold time") is is_right
    assert not is_exact(task, "hold the time.")
