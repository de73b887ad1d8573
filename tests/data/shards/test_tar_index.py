"""Indexes of tars: from this package, from other tools, and damaged."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.shards.tar_index import (
    group_samples,
    index_offsets,
    parse_members,
    read_index,
    scan_tar,
    split_member_name,
    write_index,
)
from muomni.errors import DataError


def _tar(path: Path, members: list[tuple[str, bytes]], form: int) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_tars_of_python_tarfile(tmp_path: Path, form: int) -> None:
    long = "folder/" + "k" * 80 if form == tarfile.USTAR_FORMAT else "folder/" + "k" * 180
    members = [(f"{long}.txt", b"a"), (f"{long}.0.png", b"b" * 600), ("./second.txt", b"")]
    path = _tar(tmp_path / "x.tar", members, form)
    samples = group_samples(scan_tar(path), path)
    assert [sample.key for sample in samples] == [long, "./second"]
    buffer = path.read_bytes()[samples[0].start : samples[0].end]
    assert [
        (name, buffer[start : start + size]) for name, start, size in parse_members(buffer, "x")
    ] == members[:2]


def test_unicode_pax_names(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar", [("größe-日本.txt", b"a")], tarfile.PAX_FORMAT)
    assert [member.name for member in scan_tar(path)] == ["größe-日本.txt"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=6), st.data())
def test_every_truncation_is_detected(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, payload in enumerate(payloads):
            info = tarfile.TarInfo(f"k{number}.bin")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        end = tar.offset
    whole = buffer.getvalue()
    cut = data.draw(st.integers(0, end - 1))
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"truncated|damaged"):
        scan_tar(path)
    path.write_bytes(whole)
    assert len(scan_tar(path)) == len(payloads)


def test_damaged_header_is_rejected(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar", [("a.txt", b"1"), ("b.txt", b"2")], tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    content[1024 + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar.*byte 1024"):
        scan_tar(path)


def test_every_header_byte_is_checked(tmp_path: Path) -> None:
    """Unread fields are filled with large bytes, so that the sum exceeds its modulus."""
    header = bytearray(
        _tar(tmp_path / "x.tar", [("a.txt", b"")], tarfile.USTAR_FORMAT).read_bytes()
    )[:512]
    for unread in (slice(157, 257), slice(265, 345), slice(346, 512)):
        header[unread] = b"\xff" * len(header[unread])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert parse_members(bytes(header), "x") == [("a.txt", 512, 0)]
    for offset in range(512):
        if offset == 155:  # the space after the checksum
            continue
        changed = bytearray(header)
        changed[offset] ^= 0x41
        with pytest.raises(DataError, match="x: "):
            parse_members(bytes(changed), "x")


def test_members_of_a_key_must_be_adjacent(tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("b.txt", b"2"), ("a.png", b"3")]
    path = _tar(tmp_path / "x.tar", members, tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match="'a' are not adjacent"):
        group_samples(scan_tar(path), path)


def test_index_file_is_energons_layout(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar", [("a.txt", b"1"), ("b.txt", b"2" * 513)], tarfile.USTAR_FORMAT)
    write_index(tmp_path / "x.tar.idx", index_offsets(group_samples(scan_tar(path), path)))
    raw = np.frombuffer((tmp_path / "x.tar.idx").read_bytes(), dtype="<u8")
    assert raw.tolist() == [0, 1024, 1024 + 512 + 1024]
    assert read_index(tmp_path / "x.tar.idx").tolist() == raw.tolist()


def test_broken_index_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.idx is missing.*data_prep index"):
        read_index(tmp_path / "x.idx")
    (tmp_path / "x.idx").write_bytes(b"1234567")
    with pytest.raises(DataError, match="7 bytes"):
        read_index(tmp_path / "x.idx")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("a", "txt")),
        ("d.1/a.0.png", ("d.1/a", "0.png")),
        ("plain", ("plain", "")),
    ],
)
def test_key_ends_at_first_dot_of_the_file_name(name: str, expected: tuple[str, str]) -> None:
    assert split_member_name(name) == expected
