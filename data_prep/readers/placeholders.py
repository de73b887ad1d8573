"""Conversations with tags such as `<image>` and `<audio>` in their texts: LLaVA and ShareGPT.

LLaVA, extended to audio: {"id", "image": path or list, "audio": path or list, "conversations": [{"from",
"value"}]}. A gpt turn may carry "audio", the spoken form of its value. ShareGPT, as written by
LLaMA-Factory and others: {"conversations" or "messages", "images": [path, ...], "audios": [path, ...],
"system": text}. `conversations.py` has the rules.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers.chat_files import read_chat_files


def read_llava(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSON list or JSON lines; raises `DataError` if it is missing."""
    return read_chat_files(src, options, "LLaVA file", "record")


def read_sharegpt(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSON list or JSON lines; raises `DataError` if it is missing."""
    return read_chat_files(src, options, "ShareGPT file", "record")
