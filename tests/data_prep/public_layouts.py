"""A tiny corpus in the layout of each registered format; every writer returns the value of --src."""

import json
from collections.abc import Callable
from pathlib import Path

from muomni.data.shards.manifest import Task
from tests.data_prep.chat_layouts import (
    write_alpaca,
    write_chat_parquet,
    write_llava,
    write_messages,
    write_openai,
    write_sharegpt,
    write_swift,
)
from tests.data_prep.corpus_files import (
    NUM_SAMPLES,
    TEXTS,
    write_file,
    write_images,
    write_parquet,
    write_table,
    write_tar,
)
from tests.data_prep.raw_corpora import image, write_coco, write_librispeech, write_ljspeech
from tests.data_prep.speech_layouts import (
    speech_rows,
    write_aishell,
    write_arctic,
    write_commonvoice,
    write_gigaspeech,
    write_kaldi,
    write_lhotse,
    write_libritts,
    write_mls,
    write_nemo,
    write_shar,
    write_speech_parquet,
    write_speech_tars,
    write_vctk,
)


def _image_rows(root: Path) -> list[dict]:
    return [
        {"image": name, "caption": text}
        for name, text in zip(write_images(root), TEXTS, strict=True)
    ]


def write_flickr30k(root: Path) -> Path:
    """The token file, with two captions per image."""
    names = write_images(root / "flickr30k-images")
    lines = [
        f"{name}#{n}\t{text} ({n})"
        for n in range(2)
        for name, text in zip(names, TEXTS, strict=True)
    ]
    write_file(root / "results_20130124.token", "\n".join(lines) + "\n")
    return root


def write_flickr30k_csv(root: Path) -> Path:
    """The table of the Kaggle archive, in its own folder beside the images."""
    names = write_images(root / "flickr30k_images/flickr30k_images")
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| 0| {text}" for name, text in zip(names, TEXTS, strict=True)]
    write_file(root / "flickr30k_images/results.csv", "\n".join(lines) + "\n")
    return root


def write_cc3m(root: Path) -> Path:
    names = write_images(root / "train")
    lines = [f"{text}\ttrain/{name}\n" for name, text in zip(names, TEXTS, strict=True)]
    return write_file(root / "Train_GCC-training.tsv", "".join(lines))


def write_image_folder(root: Path) -> Path:
    for number, name in enumerate(write_images(root / "train/deep/er")):
        write_file(root / "train/deep/er" / f"{name[:-4]}.txt", TEXTS[number])
    return root


def write_img2dataset(root: Path) -> Path:
    for number, text in enumerate(TEXTS):
        stem = root / f"{number // 3:05d}/{number // 3:05d}{number % 3:04d}"
        write_file(stem.with_suffix(".jpg"), image(number, kind="JPEG"))
        write_file(stem.with_suffix(".txt"), text)
        facts = {"url": f"http://a.example/{number}.jpg", "caption": text, "status": "success"}
        write_file(stem.with_suffix(".json"), json.dumps(facts))
    write_file(root / "00000_stats.json", "{}")
    return root


def write_image_parquet(root: Path) -> Path:
    rows = [
        {"image": {"bytes": image(n), "path": f"pic{n}.png"}, "caption": text}
        for n, text in enumerate(TEXTS)
    ]
    write_parquet(root / "data/train-00000-of-00001.parquet", rows)
    return root


def write_image_tars(root: Path) -> Path:
    """Captions after all images, with suffixes in capitals."""
    images = [(f"IMG_{number}.PNG", image(number)) for number in range(NUM_SAMPLES)]
    texts = [(f"IMG_{number}.TXT", text) for number, text in enumerate(TEXTS)]
    write_tar(root / "train/0.tar", [*images, *texts])
    return root


def write_text_tars(root: Path) -> Path:
    write_tar(root / "0.tar", [(f"{n}.json", json.dumps({"text": t})) for n, t in enumerate(TEXTS)])
    return root


_TABLES = ("csv", "tsv", "jsonl")


_AUDIO_CLIPS: dict[str, Callable[[Path], Path]] = {
    "aishell": write_aishell,
    "arctic": write_arctic,
    "commonvoice": write_commonvoice,
    "gigaspeech": write_gigaspeech,
    "kaldi": write_kaldi,
    "lhotse": write_lhotse,
    "librispeech": write_librispeech,
    "libritts": write_libritts,
    "ljspeech": lambda root: write_ljspeech(root, TEXTS),
    "mls": write_mls,
    "nemo": write_nemo,
    "parquet": write_speech_parquet,
    "shar": write_shar,
    "vctk": write_vctk,
    "webdataset": write_speech_tars,
    **{s: lambda root, s=s: write_table(root, s, speech_rows(root)) for s in _TABLES},
}


LAYOUTS: dict[Task, dict[str, Callable[[Path], Path]]] = {
    "image-caption": {
        "cc3m": write_cc3m,
        "coco": write_coco,
        "flickr30k": write_flickr30k,
        "folder": write_image_folder,
        "img2dataset": write_img2dataset,
        "parquet": write_image_parquet,
        "webdataset": write_image_tars,
        **{s: lambda root, s=s: write_table(root, s, _image_rows(root)) for s in _TABLES},
    },
    "speech": _AUDIO_CLIPS,
    "tts": _AUDIO_CLIPS,
    "text": {
        "parquet": lambda root: write_parquet(root / "a.parquet", [{"text": t} for t in TEXTS]),
        "webdataset": write_text_tars,
        "txt": lambda root: write_file(root / "a.txt", "\n".join(TEXTS)),
        **{
            s: lambda root, s=s: write_table(root, s, [{"text": t} for t in TEXTS]) for s in _TABLES
        },
    },
    "sft": {
        "alpaca": write_alpaca,
        "jsonl": write_messages,
        "llava": write_llava,
        "openai": write_openai,
        "parquet": write_chat_parquet,
        "sharegpt": write_sharegpt,
        "swift": write_swift,
    },
}
