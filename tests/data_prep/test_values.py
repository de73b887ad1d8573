"""Values of records: what is a text, a name, or captions, and what is refused."""

import math

import pytest

from data_prep.corpus import BadSampleError
from data_prep.values import is_missing, name_value, shown, text_value, texts_value


def test_null_and_nan_are_missing_but_zero_is_a_value() -> None:
    assert is_missing(None) and is_missing(math.nan)
    assert not any(map(is_missing, (0, 0.0, False, "", "nan", [])))
    assert text_value(math.nan, "text") == "" == name_value(None, "speaker")


@pytest.mark.parametrize("value", [0, 0.0, "0", " 0 "])
def test_equal_names_are_one_name(value: object) -> None:
    assert name_value(value, "speaker") == "0"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "'text' is a number"),
        (True, "'text' is a truth value"),
        (["a", "b"], "'text' is a list"),
        ({"en": "hi", "de": "hallo"}, "a struct of en, de"),
        (b"\xff", "'text' is binary"),
    ],
)
def test_a_value_that_is_not_a_text_is_refused(value: object, words: str) -> None:
    with pytest.raises(BadSampleError, match=words):
        text_value(value, "text")


@pytest.mark.parametrize("value", [True, 1.5, ["a"], {"id": 1}])
def test_a_value_that_is_not_a_name_is_refused(value: object) -> None:
    with pytest.raises(BadSampleError, match="'id' is"):
        name_value(value, "id")


def test_captions_are_a_text_or_a_list_of_texts() -> None:
    assert texts_value("a cat", "caption") == ["a cat"]
    assert texts_value(["a cat", None, math.nan, "a pet"], "caption") == ["a cat", "a pet"]
    assert texts_value(None, "caption") == []
    with pytest.raises(BadSampleError, match="'caption' is a struct of raw"):
        texts_value([{"raw": "a cat"}], "caption")


def test_values_are_cut_in_messages() -> None:
    assert len(shown("x" * 10**7)) == 80
    assert shown("short") == "'short'"
