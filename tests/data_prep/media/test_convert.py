"""Segments are cut without loss; Parquet cells and whole files keep their bytes."""

import io
import struct
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile

from data_prep.cli.main import main
from data_prep.corpus import BadSampleError, Cell, Clip
from data_prep.media.convert import read_cell, read_media
from data_prep.options import ReaderOptions
from data_prep.readers.parquet import read_image_parquet, read_text_parquet
from data_prep.sharding.shard_plan import ShardingOptions, build_plan
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from tests.data_prep.corpus_files import write_file, write_parquet
from tests.data_prep.raw_corpora import audio, image

RATE = 16_000


def _read(clip: Clip) -> tuple[str, bytes]:
    return read_media(clip, "audio")


def _reason(media: Clip | Cell) -> str:
    with pytest.raises(BadSampleError) as error:
        read_media(media, "audio")
    return error.value.problem.reason


@pytest.mark.parametrize(
    ("source", "subtype", "made", "dtype"),
    [
        ("WAV", "PCM_U8", "flac", "int32"),
        ("WAV", "PCM_16", "flac", "int32"),
        ("WAV", "PCM_24", "flac", "int32"),
        ("FLAC", "PCM_16", "flac", "int32"),
        ("WAV", "ULAW", "flac", "int32"),
        ("WAV", "PCM_32", "wav", "int32"),
        ("WAV", "FLOAT", "wav", "float64"),
        ("WAV", "DOUBLE", "wav", "float64"),
    ],
)
def test_segment_has_the_same_samples(
    tmp_path: Path,
    source: str,
    subtype: str,
    made: str,
    dtype: Literal["int16", "int32", "float64"],
) -> None:
    path = tmp_path / f"a.{source.lower()}"
    noise = np.random.default_rng(0).uniform(-1, 1, (RATE, 2))
    soundfile.write(path, noise, RATE, subtype, format=source)
    extension, data = _read(Clip(str(path), 0.25, 0.5))
    assert extension == made
    whole, _ = soundfile.read(path, dtype=dtype)
    part, rate = soundfile.read(io.BytesIO(data), dtype=dtype)
    assert rate == RATE
    np.testing.assert_array_equal(part, whole[RATE // 4 : RATE * 3 // 4])
    _, left = _read(Clip(str(path), 0.25, 0.5, channel=0))
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(left), dtype=dtype)[0], part[:, 0])


def test_adjacent_segments_do_not_overlap(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.wav", audio(1, 1.0, rate=11_025))
    ends = [0.0, 0.33333, 0.66667, 1.0]
    parts = [
        soundfile.read(io.BytesIO(_read(Clip(str(path), a, b - a))[1]), dtype="int16")[0]
        for a, b in pairwise(ends)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), soundfile.read(path, dtype="int16")[0])


@pytest.mark.parametrize(("ending", "subtype"), [("ogg", "OPUS"), ("ogg", "VORBIS"), ("mp3", None)])
def test_segment_of_lossy_file(tmp_path: Path, ending: str, subtype: str | None) -> None:
    path = write_file(tmp_path / f"a.{ending}", audio(1, 2.0, fmt=ending.upper(), subtype=subtype))
    extension, data = _read(Clip(str(path), 0.5, 1.0))
    part, rate = soundfile.read(io.BytesIO(data))
    whole, _ = soundfile.read(path)
    assert (extension, len(part)) == ("flac", rate)
    np.testing.assert_allclose(part, whole[rate // 2 : rate * 3 // 2], atol=2e-3)


def test_whole_file_keeps_its_bytes(tmp_path: Path) -> None:
    content = audio(1, 1.0, fmt="OGG", subtype="OPUS")
    path = write_file(tmp_path / "a.opus", content)
    assert _read(Clip(str(path), 0.0, 1.0)) == ("ogg", content)
    assert read_media(str(path), "audio") == ("ogg", content)


def test_float_segment_has_no_time_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.linspace(-0.5, 0.5, RATE), RATE, "FLOAT")
    _, data = _read(Clip(str(path), 0.1, 0.2))
    place = data.find(b"PEAK")
    assert place > 0
    assert struct.unpack_from("<I", data, place + 12) == (0,)


def test_invalid_segments(tmp_path: Path) -> None:
    path = str(write_file(tmp_path / "a.wav", audio(1, 1.0)))
    assert _reason(Clip(path, 0.5, 0.7)) == "broken-audio"
    assert _reason(Clip(path, 2.0, 0.5)) == "broken-audio"
    assert _reason(Clip(path, -0.1, 0.5)) == "bad-record"
    assert _reason(Clip(path, 0.1, 0.0)) == "bad-record"
    assert _reason(Clip(path, 0.1, 0.5, channel=1)) == "bad-record"
    assert _reason(Clip(str(tmp_path / "none.wav"), 0, 1)) == "missing-media"
    assert _reason(Clip(str(write_file(tmp_path / "b.wav", b"RIFF")), 0, 1)) == "broken-audio"
    for ending in ("flac", "mp3"):
        content = audio(1, 1.0, fmt=ending.upper())
        cut_off = write_file(tmp_path / f"c.{ending}", content[: len(content) // 2])
        assert _reason(Clip(str(cut_off), 0.1, 0.8)) == "broken-audio"
    # Annotations are rounded: a segment may end shortly after its file.
    assert _read(Clip(path, 0.5, 0.55))[0] == "flac"


def test_cells(tmp_path: Path) -> None:
    rows = [
        {"x": {"bytes": image(0), "path": "a.jpg"}},
        {"x": {"bytes": None, "path": "a.png"}},
        {"x": {"bytes": b"GIF89a", "path": None}},
        {"x": {"bytes": None, "path": None}},
    ]
    path = str(write_parquet(tmp_path / "t.parquet", rows))
    write_file(tmp_path / "a.png", image(1))

    def cell(row: int, file: str = "") -> Cell:
        return Cell(path, row // 2, row % 2, "x.bytes", file)

    def read(cell: Cell) -> tuple[str, bytes]:
        return read_media(cell, "image")

    assert read(cell(0, "a.jpg")) == ("png", image(0)), "by content, not by name"
    assert read(cell(1, str(tmp_path / "a.png"))) == ("png", image(1))
    for row, reason in ((2, "broken-audio"), (3, "missing-media"), (9, "missing-media")):
        assert _reason(cell(row)) == reason
    assert _reason(Cell(str(tmp_path / "no.parquet"), 0, 0, "x.bytes")) == "missing-media"
    numbers = str(write_parquet(tmp_path / "n.parquet", [{"text": 5}, {"text": None}]))
    assert [read_cell(Cell(numbers, 0, row, "text")) for row in (0, 1)] == [b"5", None]


@pytest.mark.parametrize(
    ("content", "extension"),
    [
        (image(1, kind="JPEG"), "jpg"),
        (image(1, kind="WEBP"), "webp"),
        (audio(1), "wav"),
        (audio(1, fmt="FLAC"), "flac"),
        (audio(1, fmt="OGG"), "ogg"),
        (audio(1, fmt="MP3"), "mp3"),
    ],
    ids=["jpg", "webp", "wav", "flac", "ogg", "mp3"],
)
def test_format_detection(tmp_path: Path, content: bytes, extension: str) -> None:
    path = str(write_parquet(tmp_path / "t.parquet", [{"x": content}]))
    kind = "image" if extension in ("jpg", "webp") else "audio"
    assert read_media(Cell(path, 0, 0, "x"), kind) == (extension, content)


def test_row_groups_stay_together(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": image(n), "path": f"{n}"}, "caption": "x"} for n in range(60)]
    write_parquet(tmp_path / "a/train.parquet", rows[:30], 10)
    write_parquet(tmp_path / "b/train.parquet", rows[30:], 10)
    items = list(read_image_parquet(tmp_path, ReaderOptions()))
    orders = []
    for seed in (0, 1):
        options = ShardingOptions(
            **{"name": "x", "task": "image-caption", "reader": "parquet", "reader_options": {}},
            **{"source": tmp_path, "seed": seed, "val_fraction": 0, "test_fraction": 0},
            shard_size="1000",
        )
        (shard,) = build_plan(items, options).shards
        blocks = [item.block for item in shard.items]
        assert sum(a != b for a, b in pairwise(blocks)) == 5
        assert [item.key for item in shard.items] != sorted(item.key for item in shard.items)
        orders.append(blocks)
    assert orders[0] != orders[1]


def test_parquet_texts_are_read_lazily(tmp_path: Path) -> None:
    rows = [{"body": f"Text {n}"} for n in range(5)] + [{"body": ""}]
    path = write_parquet(tmp_path / "t.parquet", rows)
    items = list(read_text_parquet(path, ReaderOptions(columns={"text": "body"})))
    assert all(not item.texts and isinstance(item.span, Cell) for item in items)
    assert items[5].problem and items[5].problem.reason == "empty-text"
    main(
        [
            *("text", "--format", "parquet", "--src", str(path), "--out", str(tmp_path / "out")),
            *("--columns", "text=body", "--max-bad-fraction", "0.5", "--workers", "1"),
            *("--val-fraction", "0", "--test-fraction", "0"),
        ]
    )
    reader = SplitReader(Manifest.load(tmp_path / "out"), "train")
    assert sorted(reader.read(n)["txt"] for n in range(5)) == [
        f"Text {n}".encode() for n in range(5)
    ]
