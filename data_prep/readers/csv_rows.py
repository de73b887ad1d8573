"""Rows of delimited tables, of which a quotation mark that is never closed costs one and not the rest."""

import csv
import os
import re
from collections import deque
from collections.abc import Iterator

from data_prep.problems import BAD_RECORD, Problem
from data_prep.values import shown

# Also the most that an unclosed quotation mark makes the parser read.
_MAX_FIELD_CHARS = 1 << 26
_NUMBER = re.compile(r"[-+]?[0-9.,:]+")

Fields = list[str] | Problem


def split_rows(lines: Iterator[str], delimiter: str, has_quotes: bool) -> Iterator[Fields]:
    """The fields of each row, without the ends of lines; of an empty line, none.

    Quoted fields may contain delimiters and line breaks. A row that is not correctly quoted is a `Problem`
    that names its line, and reading continues in the next line. So it does after a row whose lines look like
    rows of their own.
    """
    csv.field_size_limit(_MAX_FIELD_CHARS)
    kept = _Lines(lines)
    quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    num_columns = 0
    while True:
        reader = csv.reader(kept, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for fields in reader:
                num_columns = num_columns or len(fields)
                if len(kept.taken) > 1 and _are_rows(kept.taken, delimiter, num_columns):
                    message = "a quoted field contains what looks like the next rows"
                    break
                kept.taken.clear()
                yield fields
            else:
                return
        except csv.Error as error:
            message = _message(error)
        yield kept.problem(message)


class _Lines:
    """Numbered lines: those taken for the current row can be put back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self._number = 0
        self.taken: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._number += 1
        self.taken.append(line)
        return line

    def problem(self, message: str) -> Problem:
        """The problem of the first line of a row; the others are put back."""
        first, *others = self.taken
        self._again.extendleft(reversed(others))
        self._number -= len(others)
        self.taken.clear()
        return Problem(BAD_RECORD, f"line {self._number}: {message}: {shown(first.rstrip())}")


def _message(error: csv.Error) -> str:
    text = str(error)
    if text.startswith("unexpected end"):
        return "a quotation mark is never closed"
    if "expected after" in text:
        return "text follows a closing quotation mark"
    if text.startswith("field larger"):
        return f"a field has more than {_MAX_FIELD_CHARS} characters"
    return text


def _are_rows(lines: list[str], delimiter: str, num_columns: int) -> bool:
    """Whether each line of a quoted row has all columns, and those without quotation marks are alike."""
    rows = [line.rstrip("\r\n").split(delimiter) for line in lines]
    if any(len(row) != num_columns for row in rows):
        return False
    columns = [column for column in zip(*rows, strict=True) if not any('"' in c for c in column)]
    kinds = [{_kind(cell) for cell in column} for column in columns]
    return all(len(each) == 1 for each in kinds) and any(each != {""} for each in kinds)


def _kind(cell: str) -> str:
    """What the cells of a column have in common: numbers, file names of one type, or single words."""
    cell = cell.strip()
    if _NUMBER.fullmatch(cell):
        return "number"
    if not cell or " " in cell:
        return ""
    return os.path.splitext(cell)[1].lower() or "word"
