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
_JOINERS = "\u200c\u200d"
_VIRAMA = 9  # canonical combining class of marks that join consonants in Indic scripts


def spoken_form(text: str) -> str:
    """Lower-case words without punctuation, separated by single spaces.

    Letters are composed (NFC), apostrophes within words are straight, and invisible format characters are
    removed.
    """
    return " ".join(_substitute(_NOT_SPOKEN, " ", folded(text)).split())


def folded(text: str) -> str:
    """The text in lower case, composed (NFC), with straight quotes, and without format characters."""
    if not text.isascii():
        text = remove_format(text.replace(_ZERO_WIDTH_SPACE, " "))
        # The lower case of a dotted capital I has a combining dot.
        text = unicodedata.normalize("NFC", text.lower().replace("i\u0307", "i"))
    return _substitute(_APOSTROPHES, "'", text.lower().translate(QUOTES))


def remove_punctuation(text: str) -> str:
    """Remove punctuation, except apostrophes and hyphens within words."""
    return _substitute(_PUNCTUATION, "", text)


def remove_format(text: str) -> str:
    """Remove format characters, such as joiners and direction marks."""
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def remove_control(text: str) -> str:
    """Remove control and format characters, except tabs, line breaks, and joiners that writing needs.

    Those are zero-width joiners and non-joiners between letters (Persian), after a virama (Indic scripts), and
    between symbols (emoji), and Arabic number signs, which are visible.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = []
    for index, character in enumerate(text):
        category = unicodedata.category(character)
        is_control = category == "Cc" and character not in "\t\n"
        is_format = category == "Cf" and unicodedata.bidirectional(character) != "AN"
        if not is_control and (not is_format or _joins(text, index)):
            kept.append(character)
    return "".join(kept)


def _joins(text: str, index: int) -> bool:
    """Whether the character is a joiner between two letters or symbols, or after a virama."""
    before, after = text[index - 1 : index], text[index + 1 : index + 2]
    if text[index] not in _JOINERS or not before:
        return False
    if unicodedata.combining(before) == _VIRAMA:
        return True
    # Emoji may end with a modifier (Sk) or a variation selector (Mn).
    kinds = ("L", "M", "So", "Sk")
    return bool(after) and all(
        unicodedata.category(each).startswith(kinds) for each in before + after
    )


def words_of(text: str, also: str = "") -> list[str]:
    """The words of a text: runs of letters, digits, marks, underscores, and the characters `also`."""
    plain = _without_marks(text)
    words = re.finditer(rf"[\w{re.escape(also)}]+", plain)
    return [text[word.start() : word.end()] for word in words]


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
