"""Conversations as lists of messages: our JSON lines, and the chat API of OpenAI.

`messages` is a list of {"role", "content"}, where `content` is a text or a list of {"type": "text",
"text"}, {"type": "image", "image": path}, and {"type": "audio", "audio": path}; OpenAI's parts are
`image_url`, `audio_url`, and `input_audio`. `conversations.py` has the rules.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers.chat_files import read_chat_files


def read_messages(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of JSON lines or a JSON list; raises `DataError` if it is missing."""
    return read_chat_files(src, options, "conversation file", "line")


def read_openai(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of JSON lines or a JSON list; raises `DataError` if it is missing."""
    return read_chat_files(src, options, "conversation file", "line")
