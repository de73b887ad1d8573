"""The shard writer: reproducible bytes, atomic files, refused samples, and other readers."""

import subprocess
import tarfile
from pathlib import Path

import pytest
from webdataset.compat import WebDataset

from muomni.data.shards.manifest import ShardRecord
from muomni.data.shards.writer import SampleCost, ShardWriter, load_record, ustar_header
from muomni.errors import DataError

SAMPLES = [(f"k{n}", [("json", b"{}" * n), ("0.png", bytes([n]) * 700 * n)]) for n in range(4)]


def _write(root: Path) -> ShardRecord:
    with ShardWriter(root, "train/x-train-000000.tar", "train") as writer:
        for key, members in SAMPLES:
            writer.add(key, members, f"group {key}", SampleCost(num_chars=3))
    assert writer.record is not None
    return writer.record


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a"), _write(tmp_path / "b")
    assert first == second
    names = sorted(path.name for path in (tmp_path / "a/train").iterdir())
    assert names == [f"x-train-000000.{end}" for end in ("cols.npy", "json", "tar", "tar.idx")]
    for name in names:
        assert (tmp_path / "a/train" / name).read_bytes() == (
            tmp_path / "b/train" / name
        ).read_bytes()


def test_tar_and_webdataset_read_it(tmp_path: Path) -> None:
    record = _write(tmp_path)
    path = tmp_path / record.path
    listing = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listing.stdout.split() == [f"{key}.{ext}" for key, ms in SAMPLES for ext, _ in ms]
    content = subprocess.run(["tar", "xOf", path, "k3.0.png"], capture_output=True, check=True)
    assert content.stdout == SAMPLES[3][1][1][1]
    read = list(WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], s["json"], s["0.png"]) for s in read] == [
        (key, dict(members)["json"], dict(members)["0.png"]) for key, members in SAMPLES
    ]


def test_failed_shard_leaves_no_files(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        ShardWriter(tmp_path, "train/x-train-000000.tar", "train") as writer,
    ):
        writer.add("a", [("txt", b"1")], "a", SampleCost())
        raise RuntimeError
    assert list((tmp_path / "train").iterdir()) == []


def test_rewriting_removes_the_old_record_first(tmp_path: Path) -> None:
    record = _write(tmp_path)
    with ShardWriter(tmp_path, record.path, "train"):
        assert load_record(tmp_path / record.path) is None


def test_rejected_samples(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train/x-train-000000.tar", "train") as writer:
        with pytest.raises(DataError, match="'a b' does not match"):
            writer.add("a b", [("txt", b"")], "g", SampleCost())
        with pytest.raises(DataError, match=r"'a\.b' does not match"):
            writer.add("a.b", [("txt", b"")], "g", SampleCost())
        with pytest.raises(DataError, match="no members"):
            writer.add("a", [], "g", SampleCost())
        writer.add("a", [("txt", b"1")], "g", SampleCost())
        with pytest.raises(DataError, match="'a' occurs twice"):
            writer.add("a", [("txt", b"2")], "g", SampleCost())


def test_python_tarfile_reads_the_header() -> None:
    info = tarfile.TarInfo.frombuf(ustar_header("name.txt", 12345), "utf-8", "strict")
    assert (info.name, info.size, info.mode, info.mtime) == ("name.txt", 12345, 0o644, 0)
    assert info.isreg() and (info.uid, info.gid, info.uname) == (0, 0, "")


def test_error_names_a_damaged_record(tmp_path: Path) -> None:
    record = _write(tmp_path)
    (tmp_path / record.path).with_suffix(".json").write_text("{}")
    with pytest.raises(DataError, match=r"x-train-000000\.json is damaged"):
        load_record(tmp_path / record.path)
