"""Texts are cut between graphemes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muomni.data.text.graphemes import cut_middle, cut_text


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("short", 5, "short"),
        ("longer", 5, "lo..."),
        ("हिन्दी भाषा", 5, "हि..."),  # two code points in front of the mark
        ("हिन्दी भाषा", 4, "..."),
        ("e\u0301e\u0301e\u0301", 5, "e\u0301..."),
        ("ab👨\u200d👩\u200d👧 cd", 7, "ab..."),
        ("a👍🏽bcd", 5, "a..."),
        ("🇩🇪🇫🇷🇮🇹", 5, "🇩🇪..."),
        ("🇩🇪🇫🇷🇮🇹", 4, "..."),
    ],
)
def test_no_grapheme_is_torn(text: str, max_chars: int, expected: str) -> None:
    assert cut_text(text, max_chars) == expected


@given(st.text(), st.integers(0, 20))
def test_cut_is_short_and_a_start(text: str, max_chars: int) -> None:
    cut = cut_text(text, max_chars, mark="")
    assert text.startswith(cut) and len(cut) <= max_chars
    assert len(text) > max_chars or cut == text


@given(st.text(), st.integers(6, 20))
def test_middle_is_cut(text: str, max_chars: int) -> None:
    cut = cut_middle(text, max_chars)
    assert len(cut) <= max_chars
    start, _, end = cut.rpartition("...")
    assert cut == text or (text.startswith(start) and text.endswith(end))


def test_both_ends_of_a_message_stay() -> None:
    message = f"cannot read {'x' * 99}; check --src"
    assert cut_middle(message, 31) == "cannot read xxxxx...check --src"
