"""Readers of corpus layouts, by task and format."""

from data_prep.corpus import Reader
from data_prep.readers.coco import read_coco
from data_prep.readers.librispeech import read_librispeech
from data_prep.readers.ljspeech import read_ljspeech
from data_prep.readers.llava import read_llava
from data_prep.readers.messages import read_messages
from data_prep.readers.plain_text import read_plain_text
from data_prep.readers.table import read_image_table, read_speech_table, read_text_table
from muomni.data.manifest import Task

READERS: dict[Task, dict[str, Reader]] = {
    "image-caption": {
        "coco": read_coco,
        "csv": read_image_table,
        "tsv": read_image_table,
        "jsonl": read_image_table,
    },
    "speech": {
        "librispeech": read_librispeech,
        "ljspeech": read_ljspeech,
        "csv": read_speech_table,
        "tsv": read_speech_table,
        "jsonl": read_speech_table,
    },
    "tts": {
        "ljspeech": read_ljspeech,
        "librispeech": read_librispeech,
        "csv": read_speech_table,
        "tsv": read_speech_table,
        "jsonl": read_speech_table,
    },
    "text": {
        "txt": read_plain_text,
        "csv": read_text_table,
        "tsv": read_text_table,
        "jsonl": read_text_table,
    },
    "sft": {"llava": read_llava, "jsonl": read_messages},
}
