"""Plain text and JSON lines in every packing; what is not text is named as what it is."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.corpus import BadSampleError, PackedSpan
from data_prep.options import ReaderOptions
from data_prep.readers import find_reader, plain_text
from data_prep.readers.opening import open_text
from data_prep.readers.plain_text import read_packed, read_plain_text
from data_prep.sharding.encode import _read_span
from muomni.errors import DataError
from tests.data_prep.commands import Capture, fails, quarantined, shard
from tests.data_prep.corpus_files import write_file

Pack = Callable[[bytes], bytes]


def _with_codec(codec: str) -> Pack:
    def pack(data: bytes) -> bytes:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return pack


PACKS: list[Pack] = [
    gzip.compress,
    bz2.compress,
    lzma.compress,
    _with_codec("zstd"),
    _with_codec("lz4"),
]


def _documents(src: Path, document: str = "line") -> list[str]:
    items = read_plain_text(src, ReaderOptions(document=document))
    return [_read_span(item.span).decode() for item in items if item.span]


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_compressed_text_has_the_documents_of_the_text(
    tmp_path: Path, pack: Pack, document: str
) -> None:
    data = b"\xef\xbb\xbfone\r\ntwo\n\n\nthr\xc3\xa9e\nfour"
    plain = write_file(tmp_path / "plain/t.txt", data)
    packed = write_file(tmp_path / "packed/t.txt.x", pack(data))
    assert _documents(packed, document) == _documents(plain, document)
    assert len(_documents(plain, document)) == {"line": 4, "paragraph": 2, "file": 1}[document]


def test_compressed_text_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(plain_text, "_READ_BYTES", 100)
    lines = [f"{number} " + "x" * (number * 37 % 5000) for number in range(60)]
    src = write_file(tmp_path / "t.txt.gz", gzip.compress("\n".join(lines).encode()))
    items = list(read_plain_text(src, ReaderOptions()))
    spans = [item.span for item in items if isinstance(item.span, PackedSpan)]
    assert [read_packed(span).decode() for span in reversed(spans)] == lines[::-1]
    assert all(span.block <= span.start < span.block + 1000 for span in spans)
    assert len({item.block for item in items}) > 20
    src.unlink()
    plain_text._block.cache_clear()
    with pytest.raises(BadSampleError):
        read_packed(spans[0])


def test_shards_of_compressed_text(tmp_path: Path) -> None:
    for name, pack in zip(
        ("a.txt.gz", "b.TXT.zst", "c/d.txt"), (PACKS[0], PACKS[3], bytes), strict=True
    ):
        write_file(tmp_path / "src" / name, pack(f"first of {name}\nsecond of {name}\n".encode()))
    manifest = shard("text", "txt", tmp_path / "src", tmp_path / "out")
    assert manifest.split("train").num_samples == 6


def test_members_of_a_compressed_file_are_joined(tmp_path: Path) -> None:
    for number, pack in enumerate(PACKS):
        src = write_file(tmp_path / f"{number}", pack(b"one\n") + pack(b"two\n"))
        assert open_text(src).read() == "one\ntwo\n"


@pytest.mark.parametrize("pack", PACKS)
def test_damaged_compression_is_named(tmp_path: Path, pack: Pack) -> None:
    data = pack("".join(f'{{"text": "line {number**5}"}}\n' for number in range(3000)).encode())
    damaged = [data[:-100]]
    if pack is gzip.compress:  # some others have no checksums
        half = len(data) // 2
        damaged.append(data[:half] + b"\xff" * 50 + data[half + 50 :])
    for content in damaged:
        src = write_file(tmp_path / "t.jsonl", content)
        for form in ("jsonl", "txt"):
            with pytest.raises(DataError, match=r"cannot decompress .*t\.jsonl"):
                list(find_reader("text", form)(src, ReaderOptions()))


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


def _tar(mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def _parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_zip(), "is a ZIP archive"),
        (_tar("w"), "is a tar archive; unpack it"),
        (_tar("w:gz"), "is a tar archive; unpack it"),
        (_parquet(), "is a Parquet file; use --format parquet"),
        (b"%PDF-1.7\n...", "is a PDF"),
        ("text\n".encode("utf-16"), "is UTF-16"),
        ("text\n".encode("utf-32"), "is UTF-32"),
        ("text\n".encode("utf-16-le"), "is UTF-16LE"),
        ("text\n".encode("utf-16-be"), "is UTF-16BE"),
    ],
    # The content as id would differ between workers: gzip stores the time.
    ids=["zip", "tar", "tar.gz", "parquet", "pdf", "utf-16", "utf-32", "utf-16-le", "utf-16-be"],
)
@pytest.mark.parametrize("form", ["txt", "csv", "tsv", "jsonl"])
def test_what_is_not_text_is_named(
    tmp_path: Path, capsys: Capture, form: str, content: bytes, words: str
) -> None:
    src = write_file(tmp_path / "file", content)
    command = ("text", "--format", form, "--src", str(src), "--out", str(tmp_path / "out"))
    assert words in fails(capsys, *command)


def test_a_folder_in_place_of_a_file_and_the_reverse(tmp_path: Path, capsys: Capture) -> None:
    file = write_file(tmp_path / "file", "text")
    out = ("--out", str(tmp_path / "out"))
    for task, form, src, words in (
        ("image-caption", "cc3m", tmp_path, "is a folder, not a file"),
        ("speech", "nemo", tmp_path, "is a folder, not a file"),
        ("image-caption", "folder", file, "is a file, not a folder"),
    ):
        assert words in fails(capsys, task, "--format", form, "--src", str(src), *out)
    command = ("speech", "--format", "csv", "--src", str(file), "--media", str(tmp_path / "no"))
    assert "media folder" in fails(capsys, *command, *out)


def test_carriage_returns_end_lines_where_there_are_no_line_feeds(tmp_path: Path) -> None:
    assert _documents(write_file(tmp_path / "a", b"one\rtwo\r\rthree")) == ["one", "two", "three"]
    assert _documents(write_file(tmp_path / "b", b"10%\r20%\ndone\r\n")) == ["10%\r20%", "done"]
    paragraphs = _documents(write_file(tmp_path / "c", b"one\rtwo\r\rthree"), "paragraph")
    assert paragraphs == ["one\rtwo", "three"]


def test_only_line_feeds_end_lines_of_other_files(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x0bfour\x0cfive\x85six"
    assert _documents(write_file(tmp_path / "t", text + "\n")) == [text]


@pytest.mark.parametrize("form", ["txt", "csv", "jsonl"])
def test_texts_of_invisible_characters_are_empty(tmp_path: Path, form: str) -> None:
    lines = ["\u200b\ufeff", "\u202bשלום\u202c", "\u2066\u2069", "a\u200bb", "\x01\x02"]
    rows = [json.dumps({"text": line}) for line in lines] if form == "jsonl" else lines
    table = "\n".join(["text", *rows] if form == "csv" else rows)
    src = write_file(tmp_path / "t", table)
    manifest = shard("text", form, src, tmp_path / "out", "--max-bad-fraction", "1")
    assert manifest.split("train").num_samples == 2
    assert list(quarantined(tmp_path / "out").values()) == ["empty-text"] * 3


def test_a_document_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_text, "_MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(plain_text, "_READ_BYTES", 100)
    src = write_file(tmp_path / "t", "short\n" + "x" * 300 + "\n" + "word\n" * 200)
    assert len(_documents(src)) == 202
    for document in ("paragraph", "file"):
        with pytest.raises(DataError, match="has a document of more than"):
            _documents(src, document)
