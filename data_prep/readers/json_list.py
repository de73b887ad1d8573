"""The entries of a JSON list, one at a time: a list may be larger than memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data_prep.readers.opening import MAX_LINE_CHARS, open_text
from data_prep.values import shown
from muomni.errors import DataError

_BLOCK_CHARS = 1 << 20
_NOT_SPACE = re.compile(r"[^ \t\r\n]")


def starts_with_list(path: Path) -> bool:
    """Whether the first character of a file opens a JSON list; raises as `open_text`."""
    with open_text(path) as file:
        return _Text(file, path, "JSON file").next_char() == "["


def list_entries(path: Path, what: str) -> Iterator[object]:
    """The entries of a JSON list.

    Raises `DataError` if the file is missing, not a list, or, with the line, at an entry that is not JSON.
    """
    with open_text(path) as file:
        text = _Text(file, path, what)
        if text.next_char() != "[":
            if not text.is_end:
                text.value()
            raise DataError(f"{path} is not a valid {what}: the top level is not a list")
        text.skip()
        is_open = text.next_char() != "]"
        while is_open:
            yield text.value()
            separator = text.next_char()
            if separator not in (",", "]"):
                raise text.error(f"expected , or ] instead of {shown(separator)}")
            is_open = separator == ","
            if is_open:
                text.skip()
        text.skip()
        if text.next_char():
            raise text.error("there is more after the list")


class _Text:
    """A position in an open text, of which only the part around it is in memory."""

    def __init__(self, file: TextIO, path: Path, what: str) -> None:
        self._file, self._path, self._what = file, path, what
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._position = 0
        self._line = 1
        self._is_read = False

    @property
    def is_end(self) -> bool:
        return self._is_read and self._position >= len(self._text)

    def next_char(self) -> str:
        """The next character that is not white space, without passing it; empty at the end."""
        while True:
            found = _NOT_SPACE.search(self._text, self._position)
            self._position = found.start() if found else len(self._text)
            if found or self._is_read:
                return found[0] if found else ""
            self._read(_BLOCK_CHARS)

    def skip(self) -> None:
        """Pass one character."""
        self._position += 1

    def value(self) -> object:
        """The JSON value at the position, which is passed."""
        self.next_char()
        while True:
            try:
                value, end = self._decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._is_read or len(self._text) - self._position > MAX_LINE_CHARS:
                    self._position = min(error.pos, len(self._text))
                    raise self.error(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from error
            else:
                # A number at the end of a block may go on in the next one.
                if end < len(self._text) or self._is_read:
                    self._position = end
                    return value
            self._read(max(_BLOCK_CHARS, len(self._text) - self._position))

    def error(self, message: str) -> DataError:
        """An error at the position."""
        line = self._line + self._text.count("\n", 0, self._position)
        return DataError(f"cannot read the {self._what} {self._path}, line {line}: {message}")

    def _read(self, num_chars: int) -> None:
        """Read on, and forget what was passed."""
        self._line += self._text.count("\n", 0, self._position)
        more = self._file.read(num_chars)
        self._is_read = not more
        self._text = self._text[self._position :] + more
        self._position = 0
