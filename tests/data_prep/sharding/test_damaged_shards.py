"""Shards damaged after they were written are detected by reading or by verification."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.cli.main import main
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.tar_index import BLOCK_BYTES, group_samples, index_path, scan_tar
from muomni.errors import DataError
from tests.data_prep.commands import Capture, fails, shard
from tests.data_prep.raw_corpora import write_coco


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a dataset with two shards."""
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
def test_truncation_is_detected_on_open(
    dataset: Path, capsys: Capture, place: Callable[[Path], int]
) -> None:
    tar = dataset / TAR
    position = place(tar)
    with tar.open("r+b") as file:
        file.truncate(position)
    assert "c-train-000000.tar has" in fails(capsys, "verify", "--workers", "1", str(dataset))
    with pytest.raises(DataError, match=r"c-train-000000\.tar has"):
        SplitReader(Manifest.load(dataset), "train")
    # Without the manifest, which records the size, the scan of the headers detects it.
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


def test_flipped_size_is_detected_on_read(dataset: Path) -> None:
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
    assert ".idx" in fails(capsys, "verify", "--full", *command[1:])
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


def test_manifest_of_another_dataset(dataset: Path, tmp_path: Path, capsys: Capture) -> None:
    shard("image-caption", "coco", write_coco(tmp_path / "src", 7), tmp_path / "other")
    (dataset / "manifest.json").write_bytes((tmp_path / "other/manifest.json").read_bytes())
    assert "manifest" in fails(capsys, "verify", "--workers", "1", str(dataset))


_FILES = [f"train/c-train-000000.{suffix}" for suffix in ("tar", "tar.idx", "cols.npy", "json")]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(name=st.sampled_from(_FILES), position=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_flipped_bit_never_drops_samples(
    pristine: dict[str, bytes], tmp_path: Path, name: str, position: int, bit: int
) -> None:
    """Samples are unchanged or an error names the shard; full verification always detects the damage."""
    content = bytearray(pristine[name])
    content[position % len(content)] ^= 1 << bit
    for path, original in pristine.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content if path == name else original)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--full", "--workers", "1", str(tmp_path)])
    assert stop.value.code == 3
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
