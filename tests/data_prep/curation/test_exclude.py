"""Masks from lists of bad samples: content, errors, and verification."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli.main import main
from data_prep.curation.exclude import mask_problems, write_mask
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.errors import ConfigError, DataError
from tests.data_prep.raw_corpora import image, write_coco


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    src = write_coco(tmp_path / "src", 20)
    arguments = ["image-caption", "--format", "coco", "--src", str(src), "--workers", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--shard-size", "6", "--val-fraction", "0.2"]
    main(arguments)
    return tmp_path / "out"


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_keys_and_ids_become_one_mask_per_split(dataset: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(dataset)
    train, val = SplitReader(manifest, "train"), SplitReader(manifest, "val")
    listing = tmp_path / "bad.jsonl"
    key = train.read(7)["__key__"]
    lines = [{"key": key}, {"id": 2}, {"id": 7, "split": "train"}, {"key": val.read(1)["__key__"]}]
    listing.write_text("\ufeff" + "\r\n".join(json.dumps(line) for line in lines) + "\n\n")
    main(["exclude", str(dataset), "--from", str(listing), "--reason", "blurred"])
    folder = dataset / "exclude"
    assert json.loads((folder / "bad-train.json").read_text()) == {
        "split": "train",
        "ids_file": "bad-train.npy",
        "reason": "blurred",
        "num_ids": 2,
    }
    ids = np.load(folder / "bad-train.npy")
    assert ids.dtype == np.uint64 and ids.tolist() == [2, 7]
    assert np.load(folder / "bad-val.npy").tolist() == [1]
    main(["verify", "--workers", "1", str(dataset)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "nobody"}', "has no sample 'nobody'"),
        ('{"id": 99}', "has no sample 99"),
        ('{"id": true}', 'has neither "key"'),
        ('{"id": 1, "split": "tests"}', "no split 'tests'"),
        ("[1]", "line 1 is not a JSON object"),
        ("{", "line 1 is not a JSON object"),
        ("", "lists no sample"),
    ],
)
def test_invalid_lists(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    listing = str(tmp_path / "bad.jsonl")
    assert message in _error(capsys, "exclude", str(dataset), "--from", listing)
    assert not (dataset / "exclude").exists()


def test_masks_are_checked(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(dataset)
    with pytest.raises(ConfigError, match="letters, digits"):
        write_mask(manifest, "../x", "train", np.array([1]), "")
    with pytest.raises(DataError, match="outside of split train"):
        write_mask(manifest, "x", "train", np.array([1000]), "")
    mask = write_mask(manifest, "x", "train", np.array([3, 1, 3]), "why")
    assert mask.ids.tolist() == [1, 3] and mask_problems(manifest) == []
    ids_file = mask.path.with_suffix(".npy")
    for ids in (
        np.array([3, 1], "u8"),
        np.array([1, 2]),
        np.array([1], "u8"),
        np.array([1, 99], "u8"),
    ):
        np.save(ids_file, ids)
        assert str(mask.path) in _error(capsys, "verify", "--workers", "1", str(dataset))
    ids_file.unlink()
    assert "cannot be used" in _error(capsys, "verify", "--workers", "1", str(dataset))


def test_masked_shards_are_not_rewritten(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(Manifest.load(dataset), "x", "train", np.array([1]), "why")
    broken = tmp_path / "src/train2017/000000000003.png"
    broken.write_bytes(image(3, kind="JPEG"))
    command = [
        "image-caption",
        "--format",
        "coco",
        "--src",
        str(tmp_path / "src"),
        "--workers",
        "1",
    ]
    command += ["--out", str(dataset), "--shard-size", "6", "--val-fraction", "0.2"]
    assert "changes the sample ids in the mask" in _error(capsys, *command)
    main(["verify", "--workers", "1", str(dataset)])
    main([*command, "--overwrite"])
    assert not (dataset / "exclude").exists()
