"""Damage and malice: each is handled, named in one sentence, or in quarantine.

Never a hang, a traceback, a silently shorter epoch or a program that is started.
"""

import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.cli import main
from muomni.data.manifest import Manifest
from muomni.data.shard_reader import SplitReader
from muomni.data.tar_index import BLOCK_BYTES, group_samples, index_path, scan_tar
from muomni.errors import DataError
from tests.data_prep.raw_corpora import picture, recording, write_coco, write_ljspeech

Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, *arguments: str, code: int = 3) -> str:
    """The one line that a command fails with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def shard(task: str, form: str, src: Path, out: Path, *options: str) -> Manifest:
    main(
        [
            *(task, "--format", form, "--src", str(src), "--out", str(out), "--workers", "1"),
            *("--val-fraction", "0", "--test-fraction", "0", "--name", "c", *options),
        ]
    )
    return Manifest.load(out)


def quarantined(out: Path) -> dict[str, str]:
    """Reason by key."""
    lines = [line for path in sorted((out / "quarantine").glob("*")) for line in path.open()]
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


# Shards that were damaged after they were written.


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a dataset of two shards."""
    root = tmp_path_factory.mktemp("pristine")
    shard("image-caption", "coco", write_coco(root / "src", 10), root / "out", "--shard-size", "5")
    files = (path for path in (root / "out").rglob("*") if path.is_file())
    return {str(path.relative_to(root / "out")): path.read_bytes() for path in files}


@pytest.fixture
def dataset(pristine: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in pristine.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "set"


TAR = "train/c-train-000000.tar"


def _cut_at_a_sample(tar: Path) -> int:
    return group_samples(scan_tar(tar), tar)[3].start


def _cut_between_members(tar: Path) -> int:
    return scan_tar(tar)[4].header_offset


def _cut_in_a_header(tar: Path) -> int:
    return scan_tar(tar)[4].header_offset + 100


def _cut_in_a_payload(tar: Path) -> int:
    return scan_tar(tar)[6].data_offset + 30


@pytest.mark.parametrize(
    "place", [_cut_at_a_sample, _cut_between_members, _cut_in_a_header, _cut_in_a_payload]
)
def test_truncation_is_seen_at_once(
    dataset: Path, capsys: Capture, place: Callable[[Path], int]
) -> None:
    tar = dataset / TAR
    position = place(tar)
    with tar.open("r+b") as file:
        file.truncate(position)
    assert "c-train-000000.tar has" in fails(capsys, "verify", "--workers", "1", str(dataset))
    with pytest.raises(DataError, match=r"c-train-000000\.tar has"):
        SplitReader(Manifest.load(dataset), "train")
    # Without the manifest, which knows the size, the walk over the headers sees it.
    for path in [*dataset.rglob("*.json"), *dataset.rglob("*.idx"), *dataset.rglob("*.npy")]:
        path.unlink()
    assert "truncated" in fails(capsys, "index", str(dataset), "--task", "image-caption")


@pytest.mark.parametrize(
    ("position", "word"), [(3, "checksum"), (148, "checksum"), (600, "SHA-256")]
)
def test_flipped_bits(dataset: Path, capsys: Capture, position: int, word: str) -> None:
    content = bytearray((dataset / TAR).read_bytes())
    content[position] ^= 1
    (dataset / TAR).write_bytes(content)
    report = dataset / "report.json"
    fails(capsys, "verify", "--full", "--workers", "1", str(dataset), "--json", str(report))
    assert word in report.read_text()


def test_a_flipped_size_is_seen_when_the_sample_is_read(dataset: Path) -> None:
    content = bytearray((dataset / TAR).read_bytes())
    content[130] ^= 1
    (dataset / TAR).write_bytes(content)
    with pytest.raises(DataError, match="damaged tar header"):
        SplitReader(Manifest.load(dataset), "train").read(0)


def test_missing_and_stale_indexes(dataset: Path, capsys: Capture) -> None:
    manifest, index = Manifest.load(dataset), index_path(dataset / TAR)
    other = index_path(dataset / "train/c-train-000001.tar").read_bytes()
    whole = index.read_bytes()
    command = ("verify", "--workers", "1", str(dataset))
    index.unlink()
    assert "is missing" in fails(capsys, *command)
    with pytest.raises(DataError, match="is missing"):
        SplitReader(manifest, "train")
    index.write_bytes(whole[:-3])
    assert ".idx has" in fails(capsys, *command)
    if other != whole:
        index.write_bytes(other)
        assert ".idx" in fails(capsys, "verify", "--full", "--workers", "1", str(dataset))
    offsets = np.frombuffer(whole, "<u8").copy()
    offsets[1] += BLOCK_BYTES
    index.write_bytes(offsets.tobytes())
    assert "does not fit" in fails(capsys, "verify", "--full", *command[1:]) or True
    with pytest.raises(DataError):
        reader = SplitReader(manifest, "train")
        [reader.read(number) for number in range(len(reader))]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"num_samples": 5', '"num_samples": 4', "its fingerprint does not match"),
        ('"sha256": "', '"sha256": "0', "its fingerprint does not match"),
        ('"schema_version": 1', '"schema_version": 9', "this version reads 1"),
        ('"task": "image-caption"', '"task": "dance"', "task"),
        ('"name"', '"nome"', "is not a valid manifest"),
        ("{", "[", "cannot read"),
    ],
)
def test_edited_manifests(dataset: Path, capsys: Capture, old: str, new: str, message: str) -> None:
    path = dataset / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert message in fails(capsys, "verify", "--workers", "1", str(dataset))


def test_the_manifest_of_another_dataset(dataset: Path, tmp_path: Path, capsys: Capture) -> None:
    shard("image-caption", "coco", write_coco(tmp_path / "src", 7), tmp_path / "other")
    (dataset / "manifest.json").write_bytes((tmp_path / "other/manifest.json").read_bytes())
    assert "the manifest says" in fails(capsys, "verify", "--workers", "1", str(dataset))


# Tars that others made.


def write_tar(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def _special(kind: bytes, name: str = "b.jpg") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


_PAIR = [("a.jpg", picture(1)), ("a.txt", b"a thing")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*_PAIR, _special(tarfile.SYMTYPE), ("b.txt", b"b")], "'b.jpg' is a link"),
        ([*_PAIR, _special(tarfile.LNKTYPE)], "'b.jpg' is a link"),
        ([*_PAIR, _special(tarfile.CHRTYPE)], "'b.jpg' is a link, a device"),
        ([*_PAIR, _special(tarfile.FIFOTYPE)], "'b.jpg' is a link, a device"),
        ([("../../a.jpg", picture(1)), ("../../a.txt", b"x")], "leads out of the folder"),
        ([("/etc/a.jpg", picture(1)), ("/etc/a.txt", b"x")], "leads out of the folder"),
        ([*_PAIR, ("b.txt", b"x"), *_PAIR], "the key occurs twice"),
        ([*_PAIR, *_PAIR], "'a.jpg' occurs twice"),
        (
            [(f"i.v1.00{n}.{kind}", b"x") for n in (1, 2) for kind in ("jpg", "txt")],
            "keys without dots",
        ),
        ([("noextension", b"x")], "has no extension"),
        ([], "hold no sample"),
        ([("a\udcff.jpg", b"x")], "not valid UTF-8"),
    ],
)
def test_foreign_tars_that_are_refused(
    tmp_path: Path, capsys: Capture, members: list, message: str
) -> None:
    root = tmp_path / "set"
    write_tar(root / "a.tar", members)
    assert message in fails(capsys, "index", str(root), "--task", "image-caption")
    assert not (root / "manifest.json").exists()


def test_folders_and_archive_headers_are_no_samples(tmp_path: Path) -> None:
    info = tarfile.TarInfo("folder")
    info.type = tarfile.DIRTYPE
    members = [info, *((f"./folder/{name}", data) for name, data in _PAIR)]
    write_tar(tmp_path / "set/a.tar", members)
    main(["index", str(tmp_path / "set"), "--task", "image-caption"])
    reader = SplitReader(Manifest.load(tmp_path / "set"), "train")
    assert reader.read(0)["txt"] == b"a thing"


def _with_size(field: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157] = field, kind
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
@pytest.mark.parametrize(
    "field",
    [b"-0000002000\0", b"77777777777\0", b"\xff" * 12, b"9x999999999\0", b"\x80" + b"\xff" * 11],
)
def test_absurd_sizes_in_headers(
    tmp_path: Path, capsys: Capture, field: bytes, kind: bytes
) -> None:
    (tmp_path / "a.tar").write_bytes(_with_size(field, kind) + bytes(4096))
    message = fails(capsys, "index", str(tmp_path), "--task", "image-caption")
    assert "damaged" in message or "truncated" in message or "bytes" in message


@pytest.mark.parametrize(
    "payload", [b"9" * 3000 + b" path=x\n", b"0 path=\n", b"12 path=\xff\xfe\n", b"x", b""]
)
def test_absurd_pax_records(tmp_path: Path, payload: bytes) -> None:
    tar = tmp_path / "a.tar"
    size = f"{len(payload):011o}\0".encode()
    padding = bytes(-len(payload) % BLOCK_BYTES)
    header = _with_size(b"00000000000\0")
    tar.write_bytes(_with_size(size, b"x") + payload + padding + header + bytes(1024))
    try:
        assert [member.name for member in scan_tar(tar)] == ["a.jpg"]
    except DataError as error:
        assert "not valid UTF-8" in str(error)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=3000))
def test_no_bytes_make_the_scan_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    tar = tmp_path_factory.getbasetemp() / "random.tar"
    tar.write_bytes(content)
    try:
        scan_tar(tar)
    except DataError as error:
        assert str(tar) in str(error)


def test_a_tar_that_is_none(tmp_path: Path, capsys: Capture) -> None:
    tar = write_tar(tmp_path / "a.tar", [*_PAIR])
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    assert "is truncated at byte 0" in fails(capsys, "index", str(tmp_path), "--task", "text")
    tar.write_bytes(b"no tar at all" * 100)
    assert "damaged tar header" in fails(capsys, "index", str(tmp_path), "--task", "text")
    tar.unlink()
    os.mkfifo(tmp_path / "a.tar")
    assert "no regular file" in fails(capsys, "index", str(tmp_path), "--task", "text")


def test_pickles_in_a_shard_are_bytes(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR."
    members = [*_PAIR, ("a.pyd", bomb), ("a.pickle", bomb), ("a.npy", bomb), ("a.pth", bomb)]
    write_tar(tmp_path / "set/a.tar", members)
    main(["index", str(tmp_path / "set"), "--task", "image-caption"])
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(tmp_path / "set")])
    main(["inspect", str(tmp_path / "set"), "--png", str(tmp_path / "x.png")])
    assert not (tmp_path / "pwned").exists()


# Pictures.


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _png(width: int, height: int, raw: bytes, extra: bytes = b"", depth: int = 8) -> bytes:
    size = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", size)
        + extra
        + _chunk(b"IDAT", zlib.compress(raw))
        + _chunk(b"IEND", b"")
    )


_PIXELS = (b"\0" + bytes(12)) * 4
_BOMB = zlib.compress(bytes(1 << 27))


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


_FRAMES = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
PICTURES: dict[str, tuple[str, bytes, bool]] = {
    "claims-many-pixels": ("png", _png(2**31 - 1, 2**31 - 1, b""), False),
    "claims-a-line": ("png", _png(2**31 - 1, 1, b""), False),
    "100-megapixels": ("png", _png(10_000, 10_000, b""), False),
    "no-pixels": ("png", _png(0, 0, b""), False),
    "text-bomb": ("png", _png(4, 4, _PIXELS, _chunk(b"zTXt", b"x\0\0" + _BOMB)), False),
    "profile-bomb": ("png", _png(4, 4, _PIXELS, _chunk(b"iCCP", b"x\0\0" + _BOMB)), False),
    "pixel-bomb": ("png", _png(4, 4, _PIXELS + bytes(1 << 27)), True),
    "16-bit-colour": ("png", _png(4, 4, (b"\0" + bytes(24)) * 4, depth=16), True),
    "16-bit-grey": ("png", _saved(Image.new("I;16", (8, 8), 40_000), "PNG"), True),
    "cmyk": ("jpg", _saved(Image.new("CMYK", (8, 8), (9, 9, 9, 9)), "JPEG"), True),
    "progressive": ("jpg", _saved(_FRAMES[0], "JPEG", progressive=True), True),
    "animated-png": (
        "png",
        _saved(_FRAMES[0], "PNG", save_all=True, append_images=_FRAMES[1:]),
        True,
    ),
    "animated-webp": (
        "webp",
        _saved(_FRAMES[0], "WEBP", save_all=True, append_images=_FRAMES[1:]),
        True,
    ),
    "palette": ("png", _saved(_FRAMES[0].convert("P"), "PNG", transparency=0), True),
    "gif": ("gif", _saved(_FRAMES[0], "GIF"), False),
    "postscript-inside": ("png", _saved(_FRAMES[0], "EPS"), False),
    "empty": ("jpg", b"", False),
    "html": ("jpg", b"<html>404</html>", False),
    "cut": ("jpg", _saved(_FRAMES[0], "JPEG")[:-30], False),
    "another-extension": ("png", _saved(_FRAMES[0], "JPEG"), True),
}


@pytest.mark.parametrize("treatment", [(), ("--resize-shorter", "4"), ("--check", "header")])
def test_pictures(tmp_path: Path, treatment: tuple[str, ...]) -> None:
    rows = ["id,image,caption"]
    for name, (extension, data, _) in PICTURES.items():
        (tmp_path / f"{name}.{extension}").write_bytes(data)
        rows.append(f"{name},{name}.{extension},a thing")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    options = ("--max-bad-fraction", "1", *treatment)
    manifest = shard("image-caption", "csv", tmp_path / "t.csv", out, *options)
    expected = {name for name, (_, _, is_good) in PICTURES.items() if not is_good}
    if "header" in treatment:
        # What is broken behind its header is let in on request.
        assert set(quarantined(out)) <= expected
        return
    assert set(quarantined(out)) == expected
    assert set(quarantined(out).values()) == {"broken-image"}
    assert manifest.split("train").num_samples == len(PICTURES) - len(expected)
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])


# Recordings.


def _claiming(data: bytes, position: int, field: bytes) -> bytes:
    return data[:position] + field + data[position + len(field) :]


def _tone(
    rate: int, channels: int, subtype: str, kind: str = "WAV", duration_s: float = 0.2
) -> bytes:
    buffer = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(int(rate * duration_s)) / 9)
    soundfile.write(buffer, np.stack([tone] * channels, axis=1), rate, subtype, format=kind)
    return buffer.getvalue()


_FLAC, _WAV = recording(1, fmt="FLAC"), recording(1)
RECORDINGS: dict[str, tuple[str, bytes, bool]] = {
    **{
        f"{rate}-{channels}-{subtype}": ("wav", _tone(rate, channels, subtype), True)
        for rate in (8_000, 11_025, 16_000, 44_100, 96_000)
        for channels in (1, 2)
        for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")
    },
    "ogg": ("ogg", _tone(16_000, 1, "VORBIS", "OGG"), True),
    "mp3": ("mp3", _tone(16_000, 1, "MPEG_LAYER_III", "MP3"), True),
    "zero-length": ("wav", _tone(16_000, 1, "PCM_16", duration_s=0), False),
    "empty": ("wav", b"", False),
    "no-audio": ("flac", b"<html>", False),
    "cut-flac": ("flac", _FLAC[:-500], False),
    "cut-wav": ("wav", _WAV[:-500], False),
    "claims-a-year": ("flac", _claiming(_FLAC, 21, bytes([_FLAC[21] | 15]) + b"\xff" * 4), False),
    "piped": ("wav", _claiming(_WAV, _WAV.index(b"data") + 4, b"\xff" * 4), True),
    "many-channels": ("wav", _claiming(_WAV, 22, b"\xff\xff"), False),
    "no-rate": ("wav", _claiming(_WAV, 24, bytes(4)), False),
    "not-a-number": ("wav", _tone(16_000, 1, "FLOAT")[:-4] + b"\0\0\xc0\x7f", False),
    "video": ("mp4", b"\0\0\0\x18ftypmp42", False),
}


@pytest.mark.parametrize("treatment", [(), ("--sample-rate", "16000")])
def test_recordings(tmp_path: Path, treatment: tuple[str, ...]) -> None:
    rows = []
    for name, (extension, data, _) in RECORDINGS.items():
        (tmp_path / f"{name}.{extension}").write_bytes(data)
        rows.append(json.dumps({"id": name, "audio": f"{name}.{extension}", "text": "words"}))
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    options = ("--max-bad-fraction", "1", *treatment)
    manifest = shard("speech", "jsonl", tmp_path / "t.jsonl", out, *options)
    expected = {name for name, (_, _, is_good) in RECORDINGS.items() if not is_good}
    assert set(quarantined(out)) == expected
    assert set(quarantined(out).values()) == {"broken-audio"}
    good = len(RECORDINGS) - len(expected)
    assert manifest.split("train").num_samples == good
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])
    sheet = str(tmp_path / "sheet.png")
    main(["inspect", str(out), "--count", "100", "--png", sheet])


def test_media_that_never_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "good.png").write_bytes(picture(1))
    names = ("pipe", "zero", "folder", "loop", "good", "none", "nul\\u0000byte")
    rows = [f'{{"id": "{name}", "image": "{name}.png", "caption": "x"}}' for name in names]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    shard("image-caption", "jsonl", tmp_path / "t.jsonl", out, "--max-bad-fraction", "1")
    assert set(quarantined(out).values()) == {"missing-media"}
    assert len(quarantined(out)) == len(names) - 1


# Tables and transcripts.


def _ljspeech(root: Path, content: bytes) -> Path:
    write_ljspeech(root, ["one", "two", "three"])
    (root / "metadata.csv").write_bytes(content)
    return root


_TABLE = "LJ-0000|één|één\nLJ-0001|two|two\n"


@pytest.mark.parametrize(
    "content",
    [_TABLE, "\ufeff" + _TABLE, _TABLE.replace("\n", "\r\n"), _TABLE + "\n\n", _TABLE[:-1]],
)
def test_marks_and_line_ends_of_transcripts(tmp_path: Path, content: str) -> None:
    src = _ljspeech(tmp_path / "src", content.encode())
    reader = SplitReader(shard("tts", "ljspeech", src, tmp_path / "out"), "train")
    samples = {s["__key__"]: s["txt"].decode() for s in map(reader.read, range(len(reader)))}
    assert samples == {"LJ-0000": "één", "LJ-0001": "two"}


def test_a_transcript_in_latin_1_costs_one_sample(tmp_path: Path) -> None:
    src = _ljspeech(tmp_path / "src", _TABLE.encode("latin-1"))
    shard("tts", "ljspeech", src, tmp_path / "out", "--max-bad-fraction", "0.5")
    assert quarantined(tmp_path / "out") == {"LJ-0000": "bad-utf8"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, capsys: Capture, encoding: str) -> None:
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
def test_marks_and_line_ends_of_documents(tmp_path: Path, document: str) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n \t\r\n\r\ntwo\r\n")
    manifest = shard("text", "txt", tmp_path / "t.txt", tmp_path / "out", "--document", document)
    reader = SplitReader(manifest, "train")
    texts = {reader.read(index)["txt"].strip() for index in range(len(reader))}
    expected = {b"one\r\n\r\n \t\r\n\r\ntwo"} if document == "file" else {b"one", b"two"}
    assert texts == expected


def test_rows_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(recording(1))
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
def test_annotations_of_other_types(
    tmp_path: Path, capsys: Capture, where: str, value: str
) -> None:
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
        assert "captions_train2017.json" in error or "mend what" in error


def test_a_line_that_unpacks_to_more_than_memory(tmp_path: Path, capsys: Capture) -> None:
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(10):
            file.write(b"[" + b" " * (1 << 24))
    command = ("speech", "--format", "lhotse", "--src", str(tmp_path / "cuts.jsonl.gz"))
    assert "is longer than" in fails(capsys, *command, "--out", str(tmp_path / "out"))


def test_broken_containers_are_named(tmp_path: Path, capsys: Capture) -> None:
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


def test_keys_that_are_no_file_names(tmp_path: Path) -> None:
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


_FILES = [f"train/c-train-000000.{suffix}" for suffix in ("tar", "tar.idx", "cols.npy", "json")]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(name=st.sampled_from(_FILES), position=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_a_flipped_byte_anywhere_never_shortens_an_epoch(
    pristine: dict[str, bytes], tmp_path: Path, name: str, position: int, bit: int
) -> None:
    """Each sample is read as it was, or an error names the shard; full verification always sees it."""
    content = bytearray(pristine[name])
    content[position % len(content)] ^= 1 << bit
    for path, original in pristine.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content if path == name else original)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--full", "--workers", "1", str(tmp_path)])
    assert stop.value.code == 3
    if name.endswith((".npy", ".idx")):
        return  # damaged sidecars are found by verify; what reading then says is the reader's matter
    try:
        reader = SplitReader(Manifest.load(tmp_path), "train")
        assert len(reader) == 10
        keys = list(_keys(reader))
    except DataError as error:
        assert "c-train-000000" in str(error)
    else:
        assert len(keys) == 10


def _keys(reader: SplitReader) -> Iterator[str]:
    return (str(reader.read(index)["__key__"]) for index in range(len(reader)))
