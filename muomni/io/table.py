"""Aligned plain-text tables for terminals and logs."""

import re
from collections.abc import Iterable, Sequence

_GAP = "  "
# A number with an optional unit ("1,024", "-0.5", "12.5 %", "1.3x", "2:05"), or a missing value.
_NUMERIC = re.compile(r"[-+]?[.]?\d[\d,.:]*(e[-+]?\d+)?(\s?[%\w/]{1,6})?|nan|-|\?|", re.IGNORECASE)


def format_table(
    headers: Sequence[str] | None, rows: Iterable[Sequence[object]], align: str | None = None
) -> str:
    """Format rows as lines with aligned columns, two spaces apart.

    Args:
        headers: one title per column; None omits the header line.
        rows: cells, converted with `str`; each row has one cell per column.
        align: "<" (left) or ">" (right) for each column, such as "<>>". By default, columns in which
            every cell is a number or a missing value ("-", "?", "") are right-aligned.

    Returns:
        The lines joined by newlines, without trailing spaces; "" for an empty table.

    Raises:
        ValueError: rows, `headers`, and `align` differ in their number of columns.
    """
    body = [[str(cell) for cell in row] for row in rows]
    lines = body if headers is None else [list(headers), *body]
    if not lines:
        return ""
    columns = list(zip(*lines, strict=True))
    if align is None:
        align = "".join(_default_alignment(column) for column in zip(*body, strict=True))
        align = align or "<" * len(columns)
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        _GAP.join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _default_alignment(cells: Sequence[str]) -> str:
    return ">" if all(_NUMERIC.fullmatch(cell) for cell in cells) else "<"
