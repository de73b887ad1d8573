"""Words of transcripts in any script; the trainer and data preparation normalize alike."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.options import NORMALIZERS
from muomni.data.text.normalization import (
    remove_control,
    remove_punctuation,
    spoken_form,
    words_of,
)


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Press ONE, please.", "press one please"),
        ("  It's   5 o'clock! ", "it's 5 o'clock"),
        ("naïve_café", "naïve café"),
        ("... ?", ""),
        ("नमस्ते, दुनिया।", "नमस्ते दुनिया"),
        ("வணக்கம் உலகம்!", "வணக்கம் உலகம்"),
        ("สวัสดีชาวโลก", "สวัสดีชาวโลก"),
        ("مَرْحَبًا، שָׁלוֹם", "مَرْحَبًا שָׁלוֹם"),
        (nfd("Cafés noirs"), "cafés noirs"),
        (nfd("Tiếng Việt"), "tiếng việt"),
        (nfd("한국어"), "한국어"),
        ("İstanbul’a GİDİYORUM", "istanbul'a gidiyorum"),
        ("it’s o’clock, don`t п’ять", "it's o'clock don't п'ять"),
        ("the ‘best’ dogs' 'n' cats", "the best dogs n cats"),
        ("می\u200cخواهم soft\u00adhyphen", "میخواهم softhyphen"),
        ("co-op e-mail — yes", "co op e mail yes"),
        ("I ❤\ufe0f it", "i it"),
    ],
)
def test_spoken_form_has_only_complete_words(written: str, spoken: str) -> None:
    assert spoken_form(written) == unicodedata.normalize("NFC", spoken)
    assert NORMALIZERS["spoken"](written) == spoken_form(written)


@given(st.text())
def test_spoken_form_is_idempotent(text: str) -> None:
    spoken = spoken_form(text)
    assert spoken_form(spoken) == spoken


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_text_keeps_its_letters_and_digits(text: str) -> None:
    kept = "".join(re.findall(r"[a-z0-9]", text.lower()))
    assert "".join(re.findall(r"[a-z0-9]", spoken_form(text))) == kept


def test_marks_survive_the_data_tools() -> None:
    assert remove_punctuation("नमस्ते, 'well-known'!") == "नमस्ते well-known"
    assert words_of("का, की") == ["का", "की"]
    assert words_of("don't का", also="'") == ["don't", "का"]


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",  # non-joiner between Persian letters
        "ന്\u200d വരും",  # joiner after a virama ends an old Malayalam chillu
        "र\u200d्य क्\u200cष",  # joiners beside a virama
        "👨🏽\u200d👩\u200d👧 ❤\ufe0f\u200d🔥",  # one character each
        "\u06dd\u0661",  # a visible number sign
        "tab\tand\nline",
    ],
)
def test_control_keeps_what_writing_needs(text: str) -> None:
    assert remove_control(text) == text
    assert NORMALIZERS["control"](text) == text


def test_control_removes_what_is_invisible() -> None:
    text = "\u200c\ufeffa\u200b b\u200d \u200ec\u202e\x00\x1b[1m\u200d"
    assert remove_control(text) == "a b c[1m"


@given(st.text())
def test_control_is_idempotent(text: str) -> None:
    assert remove_control(remove_control(text)) == remove_control(text)
