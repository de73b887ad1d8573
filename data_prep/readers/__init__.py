"""Readers of corpus layouts, by task and format."""

from data_prep.corpus import Reader
from data_prep.readers.arctic import read_arctic
from data_prep.readers.cc3m import read_cc3m
from data_prep.readers.coco import read_coco
from data_prep.readers.commonvoice import read_commonvoice
from data_prep.readers.flickr30k import read_flickr30k
from data_prep.readers.gigaspeech import read_gigaspeech
from data_prep.readers.image_folder import read_image_folder, read_img2dataset
from data_prep.readers.lhotse import read_lhotse
from data_prep.readers.librispeech import read_librispeech
from data_prep.readers.libritts import read_libritts
from data_prep.readers.ljspeech import read_ljspeech
from data_prep.readers.llava import read_llava
from data_prep.readers.messages import read_messages
from data_prep.readers.nemo import read_nemo
from data_prep.readers.openai import read_openai
from data_prep.readers.parquet import read_image_parquet, read_speech_parquet, read_text_parquet
from data_prep.readers.plain_text import read_plain_text
from data_prep.readers.sharegpt import read_sharegpt
from data_prep.readers.table import read_image_table, read_speech_table, read_text_table
from data_prep.readers.vctk import read_vctk
from muomni.data.shards.manifest import Task

# Audio clips with their text serve both tasks, whatever they were made for.
_AUDIO_CLIPS: dict[str, Reader] = {
    "arctic": read_arctic,
    "commonvoice": read_commonvoice,
    "csv": read_speech_table,
    "gigaspeech": read_gigaspeech,
    "jsonl": read_speech_table,
    "lhotse": read_lhotse,
    "librispeech": read_librispeech,
    "libritts": read_libritts,
    "ljspeech": read_ljspeech,
    "nemo": read_nemo,
    "parquet": read_speech_parquet,
    "tsv": read_speech_table,
    "vctk": read_vctk,
}

READERS: dict[Task, dict[str, Reader]] = {
    "image-caption": {
        "cc3m": read_cc3m,
        "coco": read_coco,
        "csv": read_image_table,
        "flickr30k": read_flickr30k,
        "folder": read_image_folder,
        "img2dataset": read_img2dataset,
        "jsonl": read_image_table,
        "parquet": read_image_parquet,
        "tsv": read_image_table,
    },
    "speech": _AUDIO_CLIPS,
    "tts": _AUDIO_CLIPS,
    "text": {
        "csv": read_text_table,
        "jsonl": read_text_table,
        "parquet": read_text_parquet,
        "tsv": read_text_table,
        "txt": read_plain_text,
    },
    "sft": {
        "jsonl": read_messages,
        "llava": read_llava,
        "openai": read_openai,
        "sharegpt": read_sharegpt,
    },
}
