"""The terminology check matches words, phrases, and identifiers, but no parts of words."""

import pytest

from scripts.check_terms import TERMS, find_terms, read_terms

RULES = read_terms("# comment\nrooms? -> package\nside by side -> parallel  # comment\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\nthe Rooms of", ["f:2: Rooms -> package"]),
        ("num_rooms = 3", ["f:1: rooms -> package"]),
        ("mushrooms, Roomsy", []),
        ("run side by\n    # side", ["f:1: side by # side -> parallel"]),
        ("--side-by-side", ["f:1: side-by-side -> parallel"]),
        ("a room  # terms: allow", []),
    ],
)
def test_matches(text: str, found: list[str]) -> None:
    assert find_terms("f", text, RULES) == found


def test_list_of_terms_is_valid() -> None:
    terms = read_terms(TERMS.read_text(encoding="utf-8"))
    assert find_terms("f", "known by heart", terms) == ["f:1: by heart -> memorized"]
