"""Aligned text tables."""

import pytest

from muomni.io.table import format_table


def test_numeric_columns_are_right_aligned():
    rows = [("thinker", 1024, "0.50", "-"), ("codec", 8, "12.25", "1.3x")]
    assert format_table(("stage", "steps", "loss", "speedup"), rows).splitlines() == [
        "stage    steps   loss  speedup",
        "thinker   1024   0.50        -",
        "codec        8  12.25     1.3x",
    ]


def test_align_overrides_the_default():
    table = format_table(("id", "text"), [("7", "a"), ("123", "bcd")], align="<>")
    assert table.splitlines() == ["id   text", "7       a", "123   bcd"]


def test_headers_are_optional():
    assert format_table(None, [("a", "1,000"), ("bcd", "20")]) == "a    1,000\nbcd     20"


@pytest.mark.parametrize(
    "cell", ["1", "-1.5", "+2", "1,024.5", "12 %", "3.1 MiB", "1e-06", "nan", "2:05"]
)
def test_numbers_are_recognized(cell):
    assert format_table(None, [(cell, "|"), ("?" * 12, "|")]).startswith(f"{cell} ")
    assert format_table(None, [("-", "|"), (cell, "|")]).startswith("-".rjust(len(cell)))


def test_lines_have_no_trailing_spaces():
    assert format_table(("a", "b"), [("x", "long text"), ("y", "")]).endswith("y")


@pytest.mark.parametrize("headers", [None, ("a", "b")])
def test_empty_table(headers):
    assert format_table(headers, []) == ("" if headers is None else "a  b")


def test_ragged_rows_are_rejected():
    with pytest.raises(ValueError):
        format_table(("a", "b"), [("1", "2"), ("3",)])
    with pytest.raises(ValueError):
        format_table(("a", "b"), [("1", "2")], align="<")
