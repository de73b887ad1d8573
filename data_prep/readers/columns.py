"""The columns of a table under standard names, as `--columns` maps them."""

from collections.abc import Mapping
from pathlib import Path

from data_prep.problems import BAD_RECORD, Problem
from data_prep.readers.rows import MORE_COLUMNS
from data_prep.readers.text_files import Record, columns_shown
from muomni.errors import ConfigError, DataError

# A column that no row has by then is missing in all rows.
_NUM_SEARCHED_ROWS = 1000


def standard_columns(mapped: Mapping[str, str], needed: tuple[str, ...]) -> dict[str, str]:
    """Column of the table by standard name; raises `ConfigError` for a name that is not a standard one."""
    names = (*needed, *MORE_COLUMNS)
    unknown = next((name for name in mapped if name not in names), None)
    if unknown:
        raise ConfigError(
            f"--columns: {unknown!r} is not one of {', '.join(names)}; give NAME=COLUMN, such as "
            f"{needed[-1]}=COLUMN"
        )
    return {name: mapped.get(name, name) for name in names}


class Columns:
    """Selects the columns of the rows of one table.

    A mapped column takes precedence over one of the standard name. A name with dots may be a field of an
    object in a column: `translation.en`.
    """

    def __init__(self, path: Path, mapped: Mapping[str, str], needed: tuple[str, ...]) -> None:
        self._path, self._needed = path, needed
        self._columns = standard_columns(mapped, needed)
        self._fields = {ours: theirs for ours, theirs in self._columns.items() if "." in theirs}
        # Columns that no row had so far.
        self._unseen = {*needed, *mapped}
        self._first: tuple[str, ...] = ()
        self._num_rows = 0

    def select(self, record: Record, is_fixed: bool) -> Record | Problem:
        """Values by standard name; a problem if the row lacks a needed column.

        Raises `DataError` if a table whose columns are fixed, or each of its first rows, lacks one.
        """
        values = {
            ours: record[theirs] for ours, theirs in self._columns.items() if theirs in record
        }
        for ours, theirs in self._fields.items():
            if theirs not in record and (value := field_of(record, theirs)) is not ABSENT:
                values[ours] = value
        if self._unseen:
            self._unseen -= values.keys()
            self._num_rows += 1
            self._first = self._first or tuple(record)
            if is_fixed or self._num_rows >= _NUM_SEARCHED_ROWS:
                self.require_found()
        for name in self._needed:
            if name not in values:
                names = columns_shown(tuple(record))
                return Problem(BAD_RECORD, f"the row has no {self._columns[name]!r} ({names})")
        return values

    def require_found(self) -> None:
        """Raise `DataError` for a column that no row had."""
        if self._unseen and self._num_rows:
            name = next(name for name in self._columns if name in self._unseen)
            raise DataError(
                f"{self._path} has no column {self._columns[name]!r} ({columns_shown(self._first)}); map one "
                f"with --columns {name}=NAME"
            )


ABSENT = object()


def field_of(record: Mapping[str, object], name: str) -> object:
    """The field of an object in a column, or of an object inside of it; `ABSENT` if there is none."""
    if name in record:
        return record[name]
    start, dot, rest = name.partition(".")
    inner = record.get(start) if dot else None
    return field_of(inner, rest) if isinstance(inner, dict) else ABSENT
