"""Readers of corpus layouts, by task and format; a reader is imported when it is used."""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.corpus import Reader

# Tasks with audio and text share their readers.
_SPEECH = {
    "aishell": "aishell:read_aishell",
    "arctic": "arctic:read_arctic",
    "commonvoice": "commonvoice:read_commonvoice",
    "csv": "table:read_speech_table",
    "gigaspeech": "gigaspeech:read_gigaspeech",
    "jsonl": "table:read_speech_table",
    "kaldi": "kaldi:read_kaldi",
    "lhotse": "lhotse:read_lhotse",
    "librispeech": "librispeech:read_librispeech",
    "libritts": "libritts:read_libritts",
    "ljspeech": "ljspeech:read_ljspeech",
    "mls": "mls:read_mls",
    "nemo": "nemo:read_nemo",
    "parquet": "parquet:read_speech_parquet",
    "shar": "lhotse_shar:read_lhotse_shar",
    "tsv": "table:read_speech_table",
    "vctk": "vctk:read_vctk",
    "webdataset": "webdataset:read_speech_tars",
}

# Task: format: module in this package and function.
READERS: dict[str, dict[str, str]] = {
    "text": {
        "csv": "table:read_text_table",
        "jsonl": "table:read_text_table",
        "parquet": "parquet:read_text_parquet",
        "tsv": "table:read_text_table",
        "txt": "plain_text:read_plain_text",
        "webdataset": "webdataset:read_text_tars",
    },
    "image-caption": {
        "cc3m": "cc3m:read_cc3m",
        "coco": "coco:read_coco",
        "csv": "table:read_image_table",
        "flickr30k": "flickr30k:read_flickr30k",
        "folder": "image_folder:read_image_folder",
        "img2dataset": "image_folder:read_img2dataset",
        "jsonl": "table:read_image_table",
        "parquet": "parquet:read_image_parquet",
        "tsv": "table:read_image_table",
        "webdataset": "webdataset:read_image_tars",
    },
    "speech": _SPEECH,
    "tts": _SPEECH,
    "sft": {
        "alpaca": "instructions:read_instructions",
        "jsonl": "messages:read_messages",
        "llava": "placeholders:read_llava",
        "openai": "messages:read_openai",
        "parquet": "chat_parquet:read_chat_parquet",
        "sharegpt": "placeholders:read_sharegpt",
        "swift": "instructions:read_instructions",
    },
}


def find_reader(task: str, corpus_format: str) -> "Reader":
    """Import the reader of a task's format."""
    module, _, function = READERS[task][corpus_format].partition(":")
    read = getattr(import_module(f"{__name__}.{module}"), function)
    # The format, not the name of a file, determines how its tables are read.
    return partial(read, table_format=corpus_format) if module == "table" else read
