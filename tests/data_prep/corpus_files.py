"""Files that raw corpora consist of: texts, tables, tars, images, and audio clips."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.data_prep.raw_corpora import audio, image

NUM_SAMPLES = 6


TEXTS = [f"Sentence number {n}." for n in range(NUM_SAMPLES)]


def write_file(path: Path, content: bytes | str) -> Path:
    """Write a file and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    return write_file(path, gzip.compress(text.encode()) if path.suffix == ".gz" else text)


def write_parquet(path: Path, rows: list[dict], rows_a_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=rows_a_group)
    return path


def write_images(folder: Path) -> list[str]:
    names = [f"{n:05d}.png" for n in range(NUM_SAMPLES)]
    for number, name in enumerate(names):
        write_file(folder / name, image(number))
    return names


def write_audio_clips(folder: Path, ending: str = "wav") -> list[str]:
    names = [f"clip_{n}.{ending}" for n in range(NUM_SAMPLES)]
    for number, name in enumerate(names):
        write_file(folder / name, audio(number, fmt=ending.upper()))
    return names


def write_table(root: Path, suffix: str, rows: list[dict]) -> Path:
    if suffix == "jsonl":
        return write_jsonl(root / "table.jsonl", rows)
    path = root / f"table.{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
