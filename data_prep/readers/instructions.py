"""Questions with one answer: Alpaca ({"instruction", "input", "output"}) and ms-swift ({"query", "response"}).

Both may have `system`, `history` ([[question, answer], ...]), `images`, and `audios`. `conversations.py`
has the rules.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers.chat_files import read_chat_files


def read_instructions(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSON list or JSON lines; raises `DataError` if it is missing."""
    return read_chat_files(src, options, "instruction file", "record")
