"""Exclusion masks: included samples, several masks and datasets, and invalid masks."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.sampling.order import SampleOrder
from muomni.data.shards.exclusion_mask import IncludedSamples, read_exclusion
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.source import Source
from muomni.errors import DataError
from tests.corpora import write_text_dataset


def write_mask(root: Path, name: str, ids: Any, split: str = "train", **more: str) -> None:
    folder = root / "exclude"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{name}.npy", np.asarray(ids))
    content = {"split": split, "ids_file": f"{name}.npy", **more}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_text_dataset(tmp_path / "text", num_train=50, num_val=10)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.sets(st.integers(0, 299)), st.integers(0, 10**6))
def test_included_samples_are_the_complement_in_order(
    num: int, excluded: set[int], first: int
) -> None:
    removed = sorted(i for i in excluded if i < num)
    included = IncludedSamples(num, np.array(removed, dtype=np.uint64), first)
    expected = [first + i for i in range(num) if i not in excluded]
    assert len(included) == len(expected)
    assert included[np.arange(len(included))].tolist() == expected


def test_masks_of_a_split_are_combined_and_change_its_digest(manifest: Manifest) -> None:
    plain = Source([manifest], "train")
    write_mask(
        manifest.root, "dedup", np.array([3, 7, 49], dtype=np.uint64), reason="equal content"
    )
    once = Source([manifest], "train")
    write_mask(manifest.root, "late", np.array([0, 7], dtype=np.uint64))
    write_mask(manifest.root, "held_out", np.array([1], dtype=np.uint64), split="val")
    both = Source([manifest], "train")
    assert (plain.num_included, once.num_included, both.num_included) == (50, 47, 46)
    assert len(both) == 50  # ids do not change
    assert len({s.exclusion_digest for s in (plain, once, both)}) == 3
    assert plain.fingerprint == both.fingerprint
    order = SampleOrder(both.all_included, seed=0)
    assert sorted(order.samples(0, 46)[0].tolist()) == sorted({*range(50)} - {0, 3, 7, 49})
    assert Source([manifest], "val").all_included[np.arange(9)].tolist() == [0, *range(2, 10)]


def test_masks_of_several_datasets(manifest: Manifest, tmp_path: Path) -> None:
    other = write_text_dataset(tmp_path / "more", num_train=20)
    write_mask(manifest.root, "a", np.array([49], dtype=np.uint64))
    write_mask(other.root, "b", np.array([0, 1], dtype=np.uint64))
    source = Source([manifest, other], "train")
    expected = [i for i in range(70) if i not in (49, 50, 51)]
    assert source.all_included[np.arange(67)].tolist() == expected
    assert source.included(1)[np.arange(18)].tolist() == list(range(52, 70))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(69) == source.read(69) and copy.describe(69) == source.describe(69)


def test_fully_excluded_split_is_rejected(manifest: Manifest) -> None:
    write_mask(manifest.root, "all", np.arange(50, dtype=np.uint64))
    with pytest.raises(DataError, match=r"has no samples \(masks exclude 50\)"):
        Source([manifest], "train")


@pytest.mark.parametrize(
    ("ids", "more", "message"),
    [
        (np.array([1, 2]), {}, r"bad\.npy has int64 \[2\]; mask ids must be uint64"),
        (np.array([[1]], dtype=np.uint64), {}, r"has uint64 \[1, 1\]"),
        (np.array([2, 1], dtype=np.uint64), {}, "not strictly ascending"),
        (np.array([2, 2], dtype=np.uint64), {}, "not strictly ascending"),
        (np.array([50], dtype=np.uint64), {}, "excludes sample 50, but the split has 50 samples"),
        (np.array([1], dtype=np.uint64), {"split": "tran"}, "split 'tran', but .* has train, val"),
        (np.array([1], dtype=np.uint64), {"ids_file": "gone.npy"}, r"cannot read .*gone\.npy"),
        (np.array([1], dtype=np.uint64), {"num_ids": 2}, "declares num_ids=2 but contains 1 ids"),
    ],
)
def test_mismatched_mask_is_rejected(
    ids: np.ndarray, more: dict[str, str], message: str, manifest: Manifest
) -> None:
    write_mask(manifest.root, "bad", ids)
    path = manifest.root / "exclude" / "bad.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    with pytest.raises(DataError, match=message):
        read_exclusion(manifest, "train")


@pytest.mark.parametrize("content", ["", "[]", '{"split": "train"}'])
def test_malformed_mask_json_is_rejected(content: str, manifest: Manifest) -> None:
    write_mask(manifest.root, "bad", np.array([1], dtype=np.uint64))
    (manifest.root / "exclude" / "bad.json").write_text(content)
    with pytest.raises(DataError, match=r"bad\.json is not a mask"):
        read_exclusion(manifest, "train")
