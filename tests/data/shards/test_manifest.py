"""Manifests: loading, discovery, fingerprints, and error messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from muomni.data.shards.manifest import Manifest, find_datasets, hash64
from muomni.data.shards.writer import SampleCost
from muomni.errors import DataError
from tests.corpora import write_dataset


def _dataset(root: Path, text: bytes = b"hello") -> Manifest:
    return write_dataset(root, "text", {"train": [("a", [("txt", text)], SampleCost(num_chars=5))]})


def test_find_datasets_by_task_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        _dataset(tmp_path / name)
    write_dataset(tmp_path / "s", "speech", {"train": [("a", [("txt", b"x")], SampleCost())]})
    (tmp_path / "unfinished").mkdir()
    assert [manifest.name for manifest in find_datasets(tmp_path, "text")] == ["a", "b", "c"]
    assert [manifest.name for manifest in find_datasets(tmp_path / "b", "text")] == ["b"]


def test_find_datasets_error_names_folder_and_command(tmp_path: Path) -> None:
    _dataset(tmp_path / "a")
    with pytest.raises(DataError, match=rf"{tmp_path} .*'tts'.*python -m data_prep tts"):
        find_datasets(tmp_path, "tts")
    with pytest.raises(DataError, match=r"nowhere does not exist.*python -m data_prep"):
        find_datasets(tmp_path / "nowhere", "tts")


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    first = _dataset(tmp_path / "1/x").fingerprint
    assert _dataset(tmp_path / "2/x").fingerprint == first
    assert _dataset(tmp_path / "3/x", b"other").fingerprint != first


def test_totals_add_up(tmp_path: Path) -> None:
    split = _dataset(tmp_path).split("train")
    assert (split.num_samples, split.totals.num_chars, split.totals.num_bytes) == (1, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("task"), "task: Field required"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.update(schema_version=99), "schema_version is 99"),
        (lambda m: m.update(fingerprint="0"), "was edited"),
        (lambda m: m["splits"]["train"]["shards"][0].update(num_samples=2), "was edited"),
    ],
)
def test_malformed_manifest_is_rejected(tmp_path: Path, change, message: str) -> None:
    _dataset(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        Manifest.load(tmp_path)
    assert "manifest.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a complete dataset"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*manifest\.json"):
        Manifest.load(tmp_path)


def test_hash_is_stable() -> None:
    assert hash64("image:000000000001") == hash64(b"image:000000000001")
    assert hash64("muomni") == 878142319173013194


def test_data_preparation_imports_no_torch() -> None:
    modules = (
        "shards.manifest", "shards.reader", "shards.writer", "shards.tar_index", "media.decode",
        "text.tokenizer", "text.turns",
    )  # fmt: skip
    imports = "; ".join(f"import muomni.data.{module}" for module in modules)
    code = f"import sys; {imports}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
