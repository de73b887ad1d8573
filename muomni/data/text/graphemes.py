"""Cut texts for tables and messages without tearing a character from its marks.

Covers combining marks, joiners, emoji modifiers, and flags. Imports only the standard library.
"""

import unicodedata

_ZERO_WIDTH_JOINER = "\u200d"
_MODIFIERS = range(0x1F3FB, 0x1F400)  # skin tones
_REGIONAL = range(0x1F1E6, 0x1F200)  # two of these letters form a flag


def cut_text(text: str, max_chars: int, mark: str = "...") -> str:
    """The text, or its start followed by `mark` if it has more than `max_chars` characters.

    The result has at most `max_chars` characters and ends with a complete grapheme.
    """
    if len(text) <= max_chars:
        return text
    end = max(0, max_chars - len(mark))
    while end > 0 and _continues(text, end):
        end -= 1
    return text[:end] + mark


def cut_middle(text: str, max_chars: int) -> str:
    """The text, or its start and end around `...` if it has more than `max_chars` characters.

    Fits messages: they start with the cause and end with the remedy, and long values are in between.
    """
    if len(text) <= max_chars:
        return text
    start = cut_text(text, max_chars * 2 // 3)
    rest = len(text) - (max_chars - len(start))
    while rest < len(text) and _continues(text, rest):
        rest += 1
    return start + text[rest:]


def _continues(text: str, index: int) -> bool:
    """Whether the character at `index` belongs to the grapheme before it."""
    character = text[index]
    if character == _ZERO_WIDTH_JOINER or text[index - 1] == _ZERO_WIDTH_JOINER:
        return True
    if ord(character) in _REGIONAL:
        start = index
        while start > 0 and ord(text[start - 1]) in _REGIONAL:
            start -= 1
        return (index - start) % 2 == 1
    return unicodedata.category(character).startswith("M") or ord(character) in _MODIFIERS
