"""Values of records as the types that readers need: never `str()` of an object.

JSON, Parquet, and tables hold null, NaN, numbers, lists, and structs where a reader expects a text, a name, or
captions. A missing value is empty; a value of another type raises `BadSampleError` with its field and type.
"""

import math
import reprlib

from data_prep.problems import BAD_RECORD, BadSampleError
from muomni.data.text.graphemes import cut_text

_MAX_SHOWN_CHARS = 80


def is_missing(value: object) -> bool:
    """Whether a value is null or NaN. Zero, False, and an empty text are values."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_value(value: object, field: str) -> str:
    """A text, unchanged; empty if missing. Numbers are not texts."""
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return value
    raise BadSampleError(BAD_RECORD, f"{field!r} is {_kind(value)}, not a text: {shown(value)}")


def texts_value(value: object, field: str) -> list[str]:
    """A text or a list of texts, such as the captions of an image; missing entries are dropped."""
    entries = value if isinstance(value, list | tuple) else [value]
    texts = (text_value(entry, field) for entry in entries if not is_missing(entry))
    return list(texts)


def name_value(value: object, field: str) -> str:
    """A name, such as an id, a speaker, or a group: a text or a whole number, of which 0 is one.

    Empty if missing. 1, 1.0, and "1" are the same name.
    """
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value.strip()
    raise BadSampleError(
        BAD_RECORD, f"{field!r} is {_kind(value)}, not a text or whole number: {shown(value)}"
    )


def shown(value: object) -> str:
    """A value for a message, cut to 80 characters."""
    is_text = isinstance(value, str | bytes)
    # Of nested values, `reprlib` does not visit all.
    text = repr(value[: _MAX_SHOWN_CHARS + 1]) if is_text else reprlib.repr(value)
    return cut_text(text, _MAX_SHOWN_CHARS)


def _kind(value: object) -> str:
    """The type of a value, in words; a struct with the names of its fields."""
    if isinstance(value, dict):
        names = ", ".join(map(str, value))
        return f"a struct of {shown(names)[1:-1] or 'no fields'}"
    kinds: dict[type, str] = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        tuple: "a list",
        bytes: "binary",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
