"""Foreign tars are adopted, or rejected with an error that names the member.

They never cause a hang, a traceback, missing samples, or code execution.
"""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli.main import main
from muomni.data.media.audio import read_audio
from muomni.data.media.formats import only_medium
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.tar_index import BLOCK_BYTES, scan_tar
from muomni.data.text.sample_texts import sample_captions
from muomni.data.text.turns import find_medium
from muomni.errors import DataError
from tests.data_prep.commands import Capture, fails
from tests.data_prep.raw_corpora import audio, image


def write_tar(path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
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


_PAIR = [("a.jpg", image(1)), ("a.txt", b"a thing")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*_PAIR, _special(tarfile.SYMTYPE), ("b.txt", b"b")], "'b.jpg' is a link"),
        ([*_PAIR, _special(tarfile.LNKTYPE)], "'b.jpg' is a link"),
        ([*_PAIR, _special(tarfile.CHRTYPE)], "'b.jpg' is a link, device"),
        ([*_PAIR, _special(tarfile.FIFOTYPE)], "'b.jpg' is a link, device"),
        ([("../../a.jpg", image(1)), ("../../a.txt", b"x")], "would be extracted outside"),
        ([("/etc/a.jpg", image(1)), ("/etc/a.txt", b"x")], "would be extracted outside"),
        ([*_PAIR, ("b.txt", b"x"), *_PAIR], "the key occurs twice"),
        ([*_PAIR, *_PAIR], "'a.jpg' occurs twice"),
        (
            [(f"i.v1.00{n}.{kind}", b"x") for n in (1, 2) for kind in ("jpg", "txt")],
            "keys without dots",
        ),
        ([("noextension", b"x")], "has no extension"),
        ([], "contain no sample"),
        ([("a\udcff.jpg", b"x")], "not valid UTF-8"),
    ],
)
def test_rejected_foreign_tars(
    tmp_path: Path, capsys: Capture, members: list, message: str
) -> None:
    root = tmp_path / "set"
    write_tar(root / "a.tar", members)
    assert message in fails(capsys, "index", str(root), "--task", "image-caption")
    assert not (root / "manifest.json").exists()


def test_folders_and_pax_headers_are_skipped(tmp_path: Path) -> None:
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
def test_huge_sizes_in_headers(tmp_path: Path, capsys: Capture, field: bytes, kind: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(_with_size(field, kind) + bytes(4096))
    message = fails(capsys, "index", str(tmp_path), "--task", "image-caption")
    assert "damaged" in message or "truncated" in message or "bytes" in message


@pytest.mark.parametrize(
    "payload", [b"9" * 3000 + b" path=x\n", b"0 path=\n", b"12 path=\xff\xfe\n", b"x", b""]
)
def test_invalid_pax_records(tmp_path: Path, payload: bytes) -> None:
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
def test_scan_raises_only_data_errors(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    tar = tmp_path_factory.getbasetemp() / "random.tar"
    tar.write_bytes(content)
    try:
        scan_tar(tar)
    except DataError as error:
        assert str(tar) in str(error)


def test_file_that_is_not_a_tar(tmp_path: Path, capsys: Capture) -> None:
    tar = write_tar(tmp_path / "a.tar", [*_PAIR])
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    assert "is truncated at byte 0" in fails(capsys, "index", str(tmp_path), "--task", "text")
    tar.write_bytes(b"no tar at all" * 100)
    assert "damaged tar header" in fails(capsys, "index", str(tmp_path), "--task", "text")
    tar.unlink()
    os.mkfifo(tmp_path / "a.tar")
    assert "not a regular file" in fails(capsys, "index", str(tmp_path), "--task", "text")


def test_pickles_in_a_shard_are_bytes(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR."
    members = [*_PAIR, ("a.pyd", bomb), ("a.pickle", bomb), ("a.npy", bomb), ("a.pth", bomb)]
    write_tar(tmp_path / "set/a.tar", members)
    main(["index", str(tmp_path / "set"), "--task", "image-caption"])
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(tmp_path / "set")])
    main(["inspect", str(tmp_path / "set"), "--png", str(tmp_path / "x.png")])
    assert not (tmp_path / "pwned").exists()


def _adopted(root: Path, task: str) -> list[dict[str, bytes | str]]:
    main(["index", str(root), "--task", task])
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(root)])
    reader = SplitReader(Manifest.load(root), "train")
    return [reader.read(index) for index in range(len(reader))]


def test_clutter_is_skipped_and_counted(tmp_path: Path, capsys: Capture) -> None:
    double = [(f"./._{n}.{kind}", b"\0\x05\x16\x07") for n in "ab" for kind in ("jpg", "txt")]
    pairs = [
        (f"./{n}.{kind}", data) for n in "ab" for kind, data in (("jpg", image(1)), ("txt", b"x"))
    ]
    # Before, between, and after the members of the samples.
    mixed = [part for pair in zip(double, pairs, strict=True) for part in pair]
    write_tar(tmp_path / "set/a.tar", [*mixed, (".DS_Store", b"x"), ("__MACOSX/a.jpg", b"x")])
    write_tar(tmp_path / "set/._a.tar", [])
    samples = _adopted(tmp_path / "set", "image-caption")
    assert [sorted(sample) for sample in samples] == [["__key__", "jpg", "txt"]] * 2
    printed = capsys.readouterr().out
    assert "files not read: 7 that are not data (._* 5, __MACOSX 1, hidden 1)" in printed


def test_folders_behind_links(tmp_path: Path) -> None:
    write_tar(tmp_path / "store/0.tar", _PAIR)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/val").symlink_to(tmp_path / "store")
    main(["index", str(tmp_path / "set"), "--task", "image-caption"])
    assert Manifest.load(tmp_path / "set").split("val").num_samples == 1


@pytest.mark.parametrize(
    ("member", "task", "num_chars"),
    [
        (("a.json", b'{"text": " six  w", "dnsmos": 3.1}'), "speech", 6),
        (("a.text", b"words"), "speech", 5),
        (("a.caption", b"a cat"), "image-caption", 5),
        (("a.json", b'{"captions": "a tall cat"}'), "image-caption", 10),
        (("a.json", b'{"captions": ["one", "three"]}'), "image-caption", 3),
        (("a.json", b'{"text": "document"}'), "text", 8),
    ],
)
def test_texts_in_other_members(
    tmp_path: Path, member: tuple[str, bytes], task: str, num_chars: int
) -> None:
    media = {"speech": [("a.wav", audio(1))], "image-caption": [("a.png", image(1))], "text": []}
    write_tar(tmp_path / "a.tar", [*media[task], member])
    assert len(_adopted(tmp_path, task)) == 1
    assert Manifest.load(tmp_path).split("train").totals.num_chars == num_chars


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"captions": [{"raw": "a cat"}]}', "of type dict with fields raw, not text"),
        (b'{"captions": {"en": "a cat"}}', "of type dict with fields en, not text"),
        (b'{"captions": [7]}', "of type int, not text"),
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
    ],
)
def test_captions_of_other_types_are_refused(
    tmp_path: Path, capsys: Capture, content: bytes, message: str
) -> None:
    write_tar(tmp_path / "a.tar", [*_PAIR, ("a.json", content)])
    error = fails(capsys, "index", str(tmp_path), "--task", "image-caption")
    assert message in error
    assert "--format webdataset" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"], "nothing is left behind"


def test_members_apart_are_refused_with_a_remedy(tmp_path: Path, capsys: Capture) -> None:
    members = [("a.jpg", image(1)), ("b.jpg", image(2)), ("a.txt", b"a"), ("b.txt", b"b")]
    write_tar(tmp_path / "a.tar", members)
    error = fails(capsys, "index", str(tmp_path), "--task", "image-caption")
    assert "are not adjacent" in error and "--format webdataset" in error


def _indexed(
    root: Path, task: str, *samples: list[tuple[str, bytes]]
) -> list[dict[str, bytes | str]]:
    """Samples of a tar that `index` and `verify` accept, as training reads them."""
    write_tar(root / "set/a.tar", [member for sample in samples for member in sample])
    main(["index", str(root / "set"), "--task", task])
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(root / "set")])
    reader = SplitReader(Manifest.load(root / "set"), "train")
    return [reader.read(number) for number in range(len(reader))]


@pytest.mark.parametrize("suffix", ["JPG", "Jpeg", "image.jpg", "jfif", "IMAGE.PNG", "0.webp"])
def test_training_reads_the_images_that_index_accepts(tmp_path: Path, suffix: str) -> None:
    (sample,) = _indexed(
        tmp_path, "image-caption", [(f"IMG_1.{suffix}", image(1)), ("IMG_1.TXT", b"a thing")]
    )
    name, data = only_medium(sample, "image")
    assert (name, data, sample_captions(sample)) == (suffix.lower(), image(1), ["a thing"])


@pytest.mark.parametrize("suffix", ["WAV", "Flac", "audio.wav", "opus", "OGA"])
def test_training_reads_the_audio_that_index_accepts(tmp_path: Path, suffix: str) -> None:
    (sample,) = _indexed(tmp_path, "speech", [(f"a.{suffix}", audio(1)), ("a.txt", b"words")])
    assert len(read_audio(sample)) == 4_800


def test_names_in_turns_may_differ_in_case(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image", "name": "0.PNG"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
    ]
    body = json.dumps({"turns": turns}).encode()
    (sample,) = _indexed(tmp_path, "sft", [("a.json", body), ("a.0.PNG", image(1))])
    members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    assert find_medium(members, "0.PNG") == image(1)


def test_samples_that_training_cannot_read_are_refused(tmp_path: Path, capsys: Capture) -> None:
    for name, members, message in (
        (
            "two",
            [("a.jpg", image(1)), ("a.png", image(2))],
            "2 members that could be its image (jpg, png)",
        ),
        ("gif", [("a.gif", image(1))], "has no image (png, jpg"),
        (
            "content",
            [("a.jpg", b"GIF89a" + bytes(40))],
            "broken image (it is a GIF image, not one of png",
        ),
    ):
        write_tar(tmp_path / name / "a.tar", [*members, ("a.txt", b"a thing")])
        assert message in fails(capsys, "index", str(tmp_path / name), "--task", "image-caption")
    write_tar(tmp_path / "case/a.tar", [("a.jpg", image(1)), ("a.JPG", image(2))])
    assert "'a.JPG' occurs twice" in fails(
        capsys, "index", str(tmp_path / "case"), "--task", "text"
    )
