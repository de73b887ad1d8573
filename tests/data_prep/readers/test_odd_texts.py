"""Tables and transcripts that are broken, or in other encodings or types, are handled or quarantined.

They never cause a hang, a traceback, missing samples, or code execution.
"""

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from data_prep.cli.main import main
from muomni.data.shards.reader import SplitReader
from tests.data_prep.commands import Capture, fails, quarantined, shard
from tests.data_prep.raw_corpora import audio, write_coco, write_ljspeech


def _ljspeech(root: Path, content: bytes) -> Path:
    write_ljspeech(root, ["one", "two", "three"])
    (root / "metadata.csv").write_bytes(content)
    return root


_TABLE = "LJ-0000|één|één\nLJ-0001|two|two\n"


@pytest.mark.parametrize(
    "content",
    [_TABLE, "\ufeff" + _TABLE, _TABLE.replace("\n", "\r\n"), _TABLE + "\n\n", _TABLE[:-1]],
)
def test_bom_and_line_endings_of_transcripts(tmp_path: Path, content: str) -> None:
    src = _ljspeech(tmp_path / "src", content.encode())
    reader = SplitReader(shard("tts", "ljspeech", src, tmp_path / "out"), "train")
    samples = {s["__key__"]: s["txt"] for s in map(reader.read, range(len(reader)))}
    assert samples == {"LJ-0000": "één".encode(), "LJ-0001": b"two"}


def test_latin_1_transcript_drops_one_sample(tmp_path: Path) -> None:
    src = _ljspeech(tmp_path / "src", _TABLE.encode("latin-1"))
    shard("tts", "ljspeech", src, tmp_path / "out", "--max-bad-fraction", "0.5")
    assert quarantined(tmp_path / "out") == {"LJ-0000": "bad-utf8"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_rejected(tmp_path: Path, capsys: Capture, encoding: str) -> None:
    text = tmp_path / "t.txt"
    text.write_bytes("some words\n".encode(encoding))
    for name in ("t.csv", "t.jsonl"):
        (tmp_path / name).write_bytes("id,text\n1,words\n".encode(encoding))
    src = _ljspeech(tmp_path / "src", _TABLE.encode(encoding))
    out = ("--out", str(tmp_path / "out"))
    for task, form, path in (
        ("text", "txt", text),
        ("text", "csv", tmp_path / "t.csv"),
        ("text", "jsonl", tmp_path / "t.jsonl"),
        ("tts", "ljspeech", src),
    ):
        error = fails(capsys, task, "--format", form, "--src", str(path), *out)
        assert "is UTF-" in error and "iconv" in error


@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_bom_and_line_endings_of_documents(tmp_path: Path, document: str) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n \t\r\n\r\ntwo\r\n")
    manifest = shard("text", "txt", tmp_path / "t.txt", tmp_path / "out", "--document", document)
    reader = SplitReader(manifest, "train")
    texts = {reader.read(index)["txt"].strip() for index in range(len(reader))}
    expected = {b"one\r\n\r\n \t\r\n\r\ntwo"} if document == "file" else {b"one", b"two"}
    assert texts == expected


def test_table_rows(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio(1))
    rows = [
        '{"id": "good", "audio": "a.wav", "text": "words"}',
        '{"id": "empty", "audio": "a.wav", "text": "  "}',
        '{"id": "null", "audio": "a.wav", "text": null}',
        '{"id": "no-audio", "audio": "", "text": "words"}',
        '{"id": "number", "audio": 7, "text": "words"}',
        '{"id": "split", "audio": "a.wav", "text": "words", "split": "dance"}',
        '{"id": "list", "audio": ["a.wav"], "text": ["words"]}',
        '{"id": "surrogate", "audio": "a.wav", "text": "\\ud800"}',
        '{"id": {"a": 1}, "audio": "a.wav"',
        "[" * 100_000,
        '{"id": ' + "9" * 5000 + "}",
        "null",
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    manifest = shard(
        "speech", "jsonl", tmp_path / "t.jsonl", tmp_path / "out", "--max-bad-fraction", "1"
    )
    assert manifest.split("train").num_samples == 1
    assert sum(manifest.dropped.values()) == len(rows) - 1
    reasons = quarantined(tmp_path / "out")
    assert reasons["empty"] == reasons["null"] == "empty-text"
    assert reasons["surrogate"] == "bad-utf8"
    assert reasons["no-audio"] == reasons["split"] == "bad-record"


@pytest.mark.parametrize("value", ["[1]", '{"a": 1}', "null", '"x"', "7", "true"])
@pytest.mark.parametrize(
    "where", ["images", "annotations", "id", "image_id", "file_name", "caption"]
)
def test_annotations_of_wrong_type(tmp_path: Path, capsys: Capture, where: str, value: str) -> None:
    src = write_coco(tmp_path / "src", 3)
    path = src / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    changed = json.loads(value)
    if where in content:
        content[where] = changed
    else:
        entry = content["images" if where in ("id", "file_name") else "annotations"][0]
        entry[where] = changed
    path.write_text(json.dumps(content))
    command = ("image-caption", "--format", "coco", "--src", str(src), "--workers", "1")
    arguments = [*command, "--out", str(tmp_path / "out"), "--max-bad-fraction", "1"]
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "captions_train2017.json" in error or "fix what" in error


def test_decompression_bomb(tmp_path: Path, capsys: Capture) -> None:
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(10):
            file.write(b"[" + b" " * (1 << 24))
    command = ("speech", "--format", "lhotse", "--src", str(tmp_path / "cuts.jsonl.gz"))
    assert "characters; write one JSON" in fails(capsys, *command, "--out", str(tmp_path / "out"))


def test_broken_containers_are_reported(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    (tmp_path / "t.csv").write_bytes(b"")
    out = ("--out", str(tmp_path / "out"))
    for task, form, name in (
        ("text", "parquet", "t.parquet"),
        ("speech", "lhotse", "t.jsonl.gz"),
        ("text", "csv", "t.csv"),
        ("sft", "llava", "t.csv"),
    ):
        error = fails(capsys, task, "--format", form, "--src", str(tmp_path / name), *out)
        assert name in error


def test_keys_that_are_not_file_names(tmp_path: Path) -> None:
    ids = ["../../x", "a.b.c", "/etc/passwd", "a b", "ü", "x" * 300, "con\u0000", "-rf"]
    lines = [
        json.dumps({"id": name, "text": f"text of {number}"}) for number, name in enumerate(ids)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    manifest = shard("text", "jsonl", tmp_path / "t.jsonl", tmp_path / "out")
    with tarfile.open(next((tmp_path / "out").rglob("*.tar"))) as tar:
        names = tar.getnames()
    assert len({name.partition(".")[0] for name in names}) == len(ids)
    assert all(name.count(".") == 1 and "/" not in name and len(name) <= 100 for name in names)
    assert manifest.split("train").num_samples == len(ids)
