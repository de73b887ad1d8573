"""The reader: round trip in any order, lazy files, and damaged shards."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.shards import reader as reader_module
from muomni.data.shards.manifest import COLUMNS, Manifest, Split, fingerprint, hash64
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.writer import SampleCost, ShardWriter
from muomni.errors import DataError

Payload = dict[str, bytes]


def write(root: Path, shards: list[list[tuple[str, Payload]]]) -> Manifest:
    records = []
    for number, samples in enumerate(shards):
        with ShardWriter(root, f"train/x-train-{number:06d}.tar", "train") as writer:
            for key, members in samples:
                cost = SampleCost(num_chars=len(key), duration_ms=7)
                writer.add(key, list(members.items()), f"group {key}", cost)
        assert writer.record is not None
        records.append(writer.record)
    splits = {"train": Split(shards=tuple(records))}
    manifest = Manifest(
        root=root,
        name="x",
        task="text",
        reader="test",
        split_rule="given",
        fingerprint=fingerprint(splits),
        splits=splits,
    )
    (root / "manifest.json").write_text(manifest.to_json())
    return Manifest.load(root)


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    return write(
        tmp_path,
        [[(f"a{n}", {"txt": b"x" * n}) for n in range(3)], [], [("b", {"0.png": b"y" * 2000})]],
    )


keys = st.text("abcXYZ019_-", min_size=1, max_size=90)
extensions = st.sampled_from(["txt", "json", "0.png", "1.flac", "wav"])
payloads = st.dictionaries(extensions, st.binary(max_size=1600), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(keys, payloads, min_size=1, max_size=8), st.integers(1, 3))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, Payload], num_shards: int
) -> None:
    listed = list(samples.items())
    shards = [listed[number::num_shards] for number in range(num_shards)]
    reader = SplitReader(write(tmp_path_factory.mktemp("set"), shards), "train")
    expected = [sample for shard in shards for sample in shard]
    assert len(reader) == len(expected)
    for index in reversed(range(len(expected))):
        key, members = expected[index]
        assert reader.read(index) == {"__key__": key, **members}
    assert reader.columns.dtype == COLUMNS
    assert reader.columns["key_hash"].tolist() == [hash64(key) for key, _ in expected]
    assert reader.columns["group_hash"].tolist() == [hash64(f"group {k}") for k, _ in expected]
    assert reader.columns["num_bytes"].tolist() == [
        sum(map(len, members.values())) for _, members in expected
    ]


def test_content_hash_depends_on_content_only(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[("a", {"txt": b"1"}), ("b", {"txt": b"1"}), ("c", {"txt": b"2"})]])
    hashes = SplitReader(manifest, "train").columns["content_hash"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_pickled_reader_reads(small: Manifest) -> None:
    reader = SplitReader(small, "train")
    reader.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(3)["__key__"] == "b"
    assert np.array_equal(copy.columns, reader.columns)


def test_files_are_closed(small: Manifest) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader = SplitReader(small, "train")
    for index in range(len(reader)):
        reader.read(index)
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("index", [-1, 4])
def test_index_outside_the_split(small: Manifest, index: int) -> None:
    with pytest.raises(IndexError):
        SplitReader(small, "train").read(index)


def test_error_of_an_unknown_split_lists_the_splits(small: Manifest) -> None:
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        SplitReader(small, "val")


@pytest.mark.parametrize("keep", [0, 512, 1024, 1500])
def test_truncated_shard_is_rejected_at_open(small: Manifest, keep: int) -> None:
    path = small.root / "train/x-train-000000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"x-train-000000\.tar has {keep} bytes"):
        SplitReader(small, "train")


@pytest.mark.parametrize("suffix", ["tar", "tar.idx", "cols.npy"])
def test_error_names_a_missing_file(small: Manifest, suffix: str) -> None:
    (small.root / f"train/x-train-000002.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"x-train-000002\.{suffix} is missing"):
        SplitReader(small, "train")


def test_sidecars_of_another_shard_are_rejected(small: Manifest) -> None:
    folder = small.root / "train"
    (folder / "x-train-000000.tar.idx").write_bytes(
        (folder / "x-train-000002.tar.idx").read_bytes()
    )
    with pytest.raises(DataError, match=r"tar\.idx has 16 bytes, 3 samples need 32"):
        SplitReader(small, "train")


def test_columns_are_read_with_a_limited_number_of_maps(
    small: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muomni.data.shards.reader._MAX_OPEN_FILES", 1)
    reader = SplitReader(small, "train")
    ids = np.array([3, 0, 2, 3, 1])
    for name in ("num_bytes", "key_hash"):
        assert reader.column(name, ids).tolist() == reader.columns[name][ids].tolist()
    assert reader.column("num_bytes", np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("tar.idx", "decreasing or past the end"),
        ("cols.npy", "has 70 bytes, too few for 3 entries"),
    ],
)
def test_unchecked_files_are_checked_on_first_use(
    small: Manifest, suffix: str, message: str
) -> None:
    path = small.root / f"train/x-train-000000.{suffix}"
    with pytest.raises(DataError, match=r"x-train-000000\.\w"):
        path.write_bytes(b"\xff" * 70)
        SplitReader(small, "train")
    path.write_bytes(b"\xff" * 70)
    reader = SplitReader(small, "train", check_files=False)
    with pytest.raises(DataError, match=message):
        _ = (reader.read(0), reader.column("num_bytes", np.array([0])))


def test_number_of_open_tars_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN_FILES", 2)
    shards = [[(f"k{number}", {"txt": b"%d" % number})] for number in range(5)]
    reader = SplitReader(write(tmp_path, shards), "train")

    def num_open() -> int:
        folder = Path("/proc/self/fd")
        return sum(os.path.realpath(file).endswith(".tar") for file in folder.iterdir())

    for number in (0, 1, 2, 0, 4, 3, 3, 0, 1):
        assert reader.read(number)["txt"] == b"%d" % number
        assert num_open() <= 2
    del reader
    assert num_open() == 0


def test_stale_index_is_rejected_on_read(small: Manifest) -> None:
    path = small.root / "train/x-train-000000.tar.idx"
    offsets = np.fromfile(path, dtype="<u8")
    offsets[1] = offsets[2]
    offsets.tofile(path)
    reader = SplitReader(small, "train")
    with pytest.raises(DataError, match="verify --full"):
        reader.read(0)
    with pytest.raises(DataError, match="is empty"):
        reader.read(1)
