"""Normalization of texts, the same for the trainer (CTC labels, word error rates) and for data preparation.

A combining mark, such as a Devanagari vowel sign or an accent of its own, is part of the word it follows;
regular expressions alone would treat it as punctuation. Imports only the standard library.
"""

import re
import unicodedata

QUOTES = str.maketrans(
    {**dict.fromkeys("‘’‚‛′", "'"), **dict.fromkeys("“”„‟″«»", '"'), "–": "-", "—": "-", "…": "..."}
)
_PUNCTUATION = re.compile(r"(?<![^\W_])['’-]|['’-](?![^\W_])|[^\w\s'’-]|_")
# Typed for an apostrophe within a word: grave and acute accent, modifier letter apostrophe.
_APOSTROPHES = re.compile(r"(?<=[^\W_])[`´ʼ](?=[^\W_])")
_NOT_SPOKEN = re.compile(r"(?<![^\W_])'|'(?![^\W_])|[^\w']|_")
_ZERO_WIDTH_SPACE = "\u200b"


def spoken_form(text: str) -> str:
    """Lower-case words without punctuation, separated by single spaces.

    Letters are composed (NFC), apostrophes within words are straight, and invisible format characters are
    removed.
    """
    if not text.isascii():
        text = remove_format(text.replace(_ZERO_WIDTH_SPACE, " "))
        # The lower case of a dotted capital I has a combining dot.
        text = unicodedata.normalize("NFC", text.lower().replace("i\u0307", "i"))
    text = _substitute(_APOSTROPHES, "'", text.lower().translate(QUOTES))
    return " ".join(_substitute(_NOT_SPOKEN, " ", text).split())


def remove_punctuation(text: str) -> str:
    """Remove punctuation, except apostrophes and hyphens within words."""
    return _substitute(_PUNCTUATION, "", text)


def remove_format(text: str) -> str:
    """Remove format characters, such as joiners and direction marks."""
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def words_of(text: str) -> list[str]:
    """The words of a text: runs of letters, digits, marks, and underscores."""
    plain = _without_marks(text)
    return [text[match.start() : match.end()] for match in re.finditer(r"\w+", plain)]


def _substitute(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """`pattern.sub` in which the marks of a word are word characters."""
    parts, end = [], 0
    for match in pattern.finditer(_without_marks(text)):
        parts += [text[end : match.start()], replacement]
        end = match.end()
    return "".join([*parts, text[end:]])


def _without_marks(text: str) -> str:
    """The text with a letter in place of each combining mark of a word."""
    if text.isascii():
        return text
    plain, is_word = [], False
    for character in text:
        is_mark = unicodedata.category(character).startswith("M")
        is_word = is_word if is_mark else character.isalnum()
        plain.append("x" if is_mark and is_word else character)
    return "".join(plain)
