"""Remote datasets: same content as local ones, listings, masks, prefetching, and mismatches."""

import json
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import _registry as fsspec_registry

from muomni.config.run import DataSection
from muomni.data.loading.loader import Loader, PlannedDataset
from muomni.data.sampling.plan import MicroBatch
from muomni.data.shards.datasets import open_datasets, open_tokenizer
from muomni.data.shards.manifest import Manifest, Split, fingerprint
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.text import TextView
from muomni.errors import DataError, MachineError
from muomni.io.remote_folder import RemoteFolder
from tests.corpora import write_text_dataset, write_tokenizer
from tests.io.http_folder import HttpFolder, serve


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path)
    return path


@pytest.fixture
def corpora(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    write_text_dataset(root / "text", num_train=40, num_val=10)
    (root / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return root


@pytest.fixture
def server(corpora: Path) -> Iterator[HttpFolder]:
    with serve(corpora) as state:
        yield state


def at(url: str, cache: Path, **settings: object) -> DataSection:
    return DataSection.model_validate({"root": url, "cache_dir": str(cache), **settings})


def samples(reader: SplitReader) -> list[dict[str, bytes | str]]:
    return [reader.read(index) for index in range(len(reader))]


def assert_equal_to_local(found: Manifest, local: Path) -> None:
    expected = Manifest.load(local)
    assert found.fingerprint == expected.fingerprint
    for split in expected.splits:
        here, there = SplitReader(expected, split), SplitReader(found, split)
        assert samples(there) == samples(here)
        assert np.array_equal(there.columns, here.columns)


def test_a_dataset_over_http(server: HttpFolder, corpora: Path, tmp_path: Path) -> None:
    [found] = open_datasets(at(f"{server.url}/text", tmp_path), ["text"])
    assert found.location == f"{server.url}/text"
    assert_equal_to_local(found, corpora / "text")
    assert not list(tmp_path.rglob("*.lock"))


def test_listing_of_datasets_over_http(server: HttpFolder, corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"datasets\.json must list the subfolders"):
        open_datasets(at(server.url, tmp_path), ["text"])
    (corpora / "datasets.json").write_text('["text"]')
    [found] = open_datasets(at(server.url, tmp_path), ["text"])
    assert found.location == f"{server.url}/text"
    with pytest.raises(DataError, match="no dataset of task 'tts', only of text"):
        open_datasets(at(server.url, tmp_path), ["tts"])


@pytest.mark.parametrize("listing", ["{}", "[1]", '["a/b"]', '[".."]', "text"])
def test_malformed_listing_is_rejected(
    server: HttpFolder, corpora: Path, tmp_path: Path, listing: str
) -> None:
    (corpora / "datasets.json").write_text(listing)
    with pytest.raises(DataError, match="must be a JSON list of names"):
        open_datasets(at(server.url, tmp_path), ["text"])


def test_listed_folder_without_dataset_is_rejected(
    server: HttpFolder, corpora: Path, tmp_path: Path
) -> None:
    (corpora / "datasets.json").write_text('["text", "speech"]')
    with pytest.raises(DataError, match=r"/speech has no manifest\.json, but .*datasets\.json"):
        open_datasets(at(server.url, tmp_path), ["text"])


def test_back_ends_with_listing_need_no_listing_file(corpora: Path, tmp_path: Path) -> None:
    data = at(f"file://{corpora}", tmp_path)
    [found] = open_datasets(data, ["text"])
    assert_equal_to_local(found, corpora / "text")
    assert open_tokenizer(data).digest == Tokenizer.load(corpora / "tokenizer.model").digest


def test_dataset_in_memory(corpora: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(corpora / "text"), "/bucket/text", recursive=True)
    [found] = open_datasets(at("memory://bucket", tmp_path), ["text"])
    assert_equal_to_local(found, corpora / "text")


def test_tokenizer_over_http(server: HttpFolder, corpora: Path, tmp_path: Path) -> None:
    local = Tokenizer.load(corpora / "tokenizer.model")
    assert open_tokenizer(at(server.url, tmp_path)).digest == local.digest
    elsewhere = at("data/none", tmp_path, tokenizer=f"{server.url}/tokenizer.model")
    assert open_tokenizer(elsewhere).digest == local.digest
    with pytest.raises(DataError, match=r"text/tokenizer\.model is missing"):
        open_tokenizer(at(f"{server.url}/text", tmp_path))


def test_sidecars_and_tars_are_copied_once(server: HttpFolder, tmp_path: Path) -> None:
    for _ in range(2):
        [found] = open_datasets(at(f"{server.url}/text", tmp_path), ["text"])
        reader = SplitReader(found, "train")
        assert reader.read(3) == pickle.loads(pickle.dumps(reader)).read(3)
    asked = {name: n for name, n in server.requests.items() if "/train/" in name}
    shard = "text/train/text-train-000000"
    assert asked == {f"{shard}.tar": 1, f"{shard}.tar.idx": 1, f"{shard}.cols.npy": 1}


@pytest.mark.parametrize("suffix", [".tar.idx", ".cols.npy"])
def test_sidecars_of_another_dataset_are_rejected(
    server: HttpFolder, tmp_path: Path, suffix: str
) -> None:
    server.fault = lambda path: "damage" if path.endswith(suffix) else None
    [found] = open_datasets(at(f"{server.url}/text", tmp_path), ["text"])
    with pytest.raises(DataError, match=rf"SHA-256 of .*\{suffix} does not match the manifest"):
        SplitReader(found, "train")
    assert not list(tmp_path.rglob(f"*{suffix}"))


@pytest.mark.parametrize("path", ["../../x.tar", "/etc/x.tar", "train/manifest.json"])
def test_manifest_cannot_refer_to_files_outside(corpora: Path, tmp_path: Path, path: str) -> None:
    manifest = Manifest.load(corpora / "text")
    record = manifest.splits["train"].shards[0].model_copy(update={"path": path})
    splits = {"train": Split(shards=(record,))}
    changed = manifest.model_copy(update={"splits": splits, "fingerprint": fingerprint(splits)})
    (tmp_path / "manifest.json").write_text(changed.to_json())
    [found] = open_datasets(at(f"file://{tmp_path}", tmp_path / "cache"), ["text"])
    with pytest.raises(DataError, match="outside of the dataset"):
        SplitReader(found, "train")


def test_edited_manifest_is_rejected(corpora: Path, tmp_path: Path) -> None:
    content = json.loads((corpora / "text/manifest.json").read_text())
    content["fingerprint"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest\.json was edited"):
        open_datasets(at(f"file://{tmp_path}", tmp_path / "cache"), ["text"])


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_remote_masks_are_synchronized(
    server: HttpFolder, corpora: Path, tmp_path: Path, scheme: str
) -> None:
    mask = corpora / "text/exclude"
    mask.mkdir()
    np.save(mask / "dedup.npy", np.array([1, 5], dtype=np.uint64))
    (mask / "dedup.json").write_text('{"split": "train", "ids_file": "dedup.npy"}')
    (corpora / "text/masks.json").write_text('["dedup"]')
    url = f"{server.url}/text" if scheme == "http" else f"file://{corpora}/text"

    def open_source() -> Source:
        return Source(open_datasets(at(url, tmp_path), ["text"]), "train")

    local = Source([Manifest.load(corpora / "text")], "train")
    assert open_source().exclusion_digest == local.exclusion_digest != ""
    assert open_source().num_included == 38
    (corpora / "text/masks.json").write_text("[]")
    assert open_source().num_included == 40
    (corpora / "text/masks.json").unlink()  # then only a folder listing shows the mask
    assert open_source().num_included == (38 if scheme == "file" else 40)


def test_announced_shards_are_prefetched(server: HttpFolder, tmp_path: Path) -> None:
    [found] = open_datasets(at(f"{server.url}/text", tmp_path), ["text"])
    reader = SplitReader(found, "val")
    reader.expect(np.arange(len(reader)))
    tar = "text/val/text-val-000000.tar"
    deadline = time.monotonic() + 60
    while not list((tmp_path / "shards").glob("*.tar")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.requests[tar] == 1
    reader.read(0)
    assert server.requests[tar] == 1


def test_remote_batches_equal_local_batches(
    server: HttpFolder, corpora: Path, tmp_path: Path
) -> None:
    view = TextView(Tokenizer.load(corpora / "tokenizer.model"), 64)
    batches = [MicroBatch(sequences=((i, i + 1), (i + 2,))) for i in range(0, 30, 3)]

    def batches_of(manifest: Manifest) -> list[dict[str, list[float]]]:
        dataset = PlannedDataset(Source([manifest], "train"), view, 0)
        return [{k: v.tolist() for k, v in b.items()} for b in Loader(dataset, batches)]

    [found] = open_datasets(at(f"{server.url}/text", tmp_path), ["text"])
    assert batches_of(found) == batches_of(Manifest.load(corpora / "text"))


@pytest.mark.parametrize(
    ("url", "module", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")]
)
def test_error_of_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    # fsspec caches the classes of protocols that another test used.
    monkeypatch.delitem(fsspec_registry, url.partition("://")[0], raising=False)
    with pytest.raises(MachineError, match=rf"pip install 'muomni\[{extra}\]'"):
        RemoteFolder(url, {"skip_instance_cache": True}).read("manifest.json")


def test_secrets_in_the_config_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="storage_options must not contain key, secret"):
        at("s3://b/x", tmp_path, storage_options={"key": "a", "secret": "b"})
