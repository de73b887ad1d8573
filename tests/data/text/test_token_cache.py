"""The token cache: same batches with and without it, separate files, damage, and full disks."""

import errno
import logging
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from muomni.data.loading.loader import LookAhead, PlannedDataset
from muomni.data.sampling.plan import Batching, MicroBatch, cover
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.source import Source
from muomni.data.shards.writer import SampleCost
from muomni.data.text import token_cache
from muomni.data.text.token_cache import TokenCache
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch, ExampleReader, View
from muomni.data.views.text import TextView
from tests.corpora import Sample, sentences, write_dataset, write_text_dataset, write_tokenizer

SEQ_LEN = 32


class Uncached(TextView):
    """Reads each text from its shard."""

    def reader(self, source: Source) -> ExampleReader[Any]:
        return View.reader(self, source)


@pytest.fixture
def manifests(tmp_path: Path) -> list[Manifest]:
    """Two corpora with short, long, empty, multi-byte, and broken texts; a mask excludes two samples."""
    odd = ["two characters " * 40, "", "Grüße, 世界 🙂" * 9, "ein Wort"]
    members = [("txt", text.encode()) for text in [*sentences(20), *odd]]
    members += [("txt", b"\xff\xfe broken"), ("json", b"{}")]  # not UTF-8; no text at all
    samples: list[Sample] = [(f"a{i:02d}", [m], SampleCost()) for i, m in enumerate(members)]
    first = write_dataset(tmp_path / "first", "text", {"train": samples})
    folder = first.root / "exclude"
    folder.mkdir()
    np.save(folder / "late.npy", np.array([3, 21], dtype=np.uint64))
    (folder / "late.json").write_text('{"split": "train", "ids_file": "late.npy"}')
    return [first, write_text_dataset(tmp_path / "second", num_train=30, num_val=5)]


@pytest.fixture
def source(manifests: list[Manifest]) -> Source:
    return Source(manifests, "train")


def batches_of(view: TextView, source: Source, through: Callable[[Any], Any] = lambda x: x) -> Any:
    """Batches of all included samples, two sequences each; `through` transforms the dataset first."""
    ids = source.all_included[np.arange(source.num_included)]
    batching = Batching("pack", 2, 2, seq_len=view.seq_len)
    micro_batches = cover(ids, view.lengths(source)[ids], batching)
    dataset = through(PlannedDataset(source, view, seed=0))
    loaded = [dataset[batch] for batch in micro_batches]
    # The number of bad samples is compared, too.
    return [{**each.tensors, "num_bad": torch.tensor(len(each.bad))} for each in loaded]


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others) > 3
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key, tensor in batch.items():
            assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


def files_of(source: Source) -> list[Path]:
    return sorted(
        path for reader in source.readers
        for path in (reader.manifest.root / source.split).glob(".tokens-*")
    )  # fmt: skip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of all samples read from shards so far."""
    numbers: list[int] = []
    read = SplitReader.read

    def counting(self: SplitReader, index: int) -> Any:
        numbers.append(index)
        return read(self, index)

    monkeypatch.setattr(SplitReader, "read", counting)
    return numbers


@pytest.mark.parametrize("is_pickled", [False, True], ids=["same process", "pickled"])
def test_cached_batches_equal_uncached_ones_without_reading_shards(
    is_pickled: bool, source: Source, tokenizer: Tokenizer, reads: list[int]
) -> None:
    expected = batches_of(Uncached(tokenizer, SEQ_LEN), source)
    assert sum(int(batch["num_bad"]) for batch in expected) == 2
    through = (lambda dataset: pickle.loads(pickle.dumps(dataset))) if is_pickled else lambda x: x
    reads.clear()
    cached = batches_of(TextView(tokenizer, SEQ_LEN), source, through)
    assert_equal(cached, expected)
    # Only the two bad samples are read, for decoding and for the log message.
    assert set(reads) == {24, 25}


def test_cached_lengths_equal_measured_lengths(
    source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = TextView(tokenizer, SEQ_LEN)
    cached = view.lengths(source)
    monkeypatch.setattr(TokenCache, "ensure", lambda *_: False)
    measured = view.lengths(source)
    assert cached.all().tolist() == measured.all().tolist()
    assert cached.depends_on == measured.depends_on


def test_read_only_folder_is_not_cached_and_warns_once(
    source: Source, tokenizer: Tokenizer, manifests: list[Manifest],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "access", lambda path, mode: "first" not in str(path))
    view = TextView(tokenizer, SEQ_LEN)
    val = Source(manifests, "val", check_files=False)
    with caplog.at_level(logging.WARNING):
        cached = batches_of(view, source)
        view.lengths(val)
    assert caplog.text.count("cannot cache token ids in") == 1
    assert {path.parent.parent.name for path in files_of(source)} == {"second"}
    assert_equal(cached, batches_of(Uncached(tokenizer, SEQ_LEN), source))


def test_full_disk_leaves_no_files(
    source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def encode(sample: dict[str, Any]) -> tuple[list[int], int]:
        return [2, 3], len(sample["__key__"])

    open_atomic = token_cache.open_atomic

    class FullDisk:
        def __init__(self, path: Path) -> None:
            self.inner = open_atomic(path)

        def __enter__(self) -> Full:
            return Full(self.inner.__enter__())

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    monkeypatch.setattr(token_cache, "open_atomic", FullDisk)
    cache = TokenCache(source.readers[0], tokenizer)
    assert not cache.ensure(source.readers[0], encode)
    assert "No space left on device" in caplog.text
    assert files_of(source) == []


def test_cache_files_are_separate_per_tokenizer_and_dataset(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    TextView(tokenizer, SEQ_LEN).lengths(source)
    assert len(files_of(source)) == 4
    write_tokenizer(tmp_path / "other.model", vocab_size=320)
    other = TextView(Tokenizer.load(tmp_path / "other.model"), SEQ_LEN)
    assert not TokenCache(source.readers[0], other.tokenizer).is_complete()
    assert_equal(
        batches_of(other, source),
        batches_of(Uncached(other.tokenizer, SEQ_LEN), source),
    )
    assert len(files_of(source)) == 8
    changed = Source([write_text_dataset(tmp_path / "second", num_train=31)], "train")
    assert not TokenCache(changed.readers[0], tokenizer).is_complete()


@pytest.mark.parametrize("suffix", ["ids", "texts"])
@pytest.mark.parametrize("num_lost", [1, 16, None], ids=str)
def test_damaged_cache_is_rebuilt_with_a_warning(
    suffix: str, num_lost: int | None, source: Source, tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    view = TextView(tokenizer, SEQ_LEN)
    view.lengths(source)
    whole = {path: path.read_bytes() for path in files_of(source)}
    path = next(path for path in whole if path.suffix == f".{suffix}")
    path.write_bytes(whole[path][:-num_lost] if num_lost else b"")
    expected = batches_of(Uncached(tokenizer, SEQ_LEN), source)
    assert "rebuilding damaged token cache" in caplog.text
    assert {path: path.read_bytes() for path in files_of(source)} == whole
    assert_equal(batches_of(view, source), expected)


def test_ids_take_two_bytes_or_four_with_a_large_vocabulary(source: Source) -> None:
    reader = source.readers[1]
    for vocab_size, num_bytes in ((1 << 16, 2), ((1 << 16) + 1, 4)):
        tokenizer: Any = SimpleNamespace(vocab_size=vocab_size, digest=str(vocab_size))
        cache = TokenCache(reader, tokenizer)
        assert cache.ensure(reader, lambda _, last=vocab_size - 1: ([2, last, 3], 5))
        found = cache.find(29)
        assert found is not None and found[0].tolist() == [2, vocab_size - 1, 3] and found[1] == 5
        ids = cache.folder / f"{cache._name}.ids"
        assert ids.stat().st_size == 30 * 3 * num_bytes


def test_one_process_tokenizes_while_others_wait(source: Source, tokenizer: Tokenizer) -> None:
    reader = source.readers[1]
    has_started, may_continue = threading.Event(), threading.Event()
    num_encoded = 0

    def encode(_: dict[str, Any]) -> tuple[list[int], int]:
        nonlocal num_encoded
        num_encoded += 1
        has_started.set()
        assert may_continue.wait(30)
        return [2, 3], 0

    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(TokenCache(reader, tokenizer).ensure(reader, encode)))
        for _ in range(2)
    ]  # fmt: skip
    threads[0].start()
    assert has_started.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    may_continue.set()
    for thread in threads:
        thread.join()
    assert results == [True, True] and num_encoded == 30
    assert [path.suffix for path in files_of(source)] == [".ids", ".texts"]


def test_only_shards_of_uncached_texts_are_prefetched(
    source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = TextView(tokenizer, SEQ_LEN)
    first = source.readers[0]
    TokenCache(first, tokenizer).ensure(first, view._ids_and_bytes)
    expected: list[list[int]] = []
    monkeypatch.setattr(Source, "expect", lambda _, ids: expected.append(ids.tolist()))
    batch = MicroBatch(sequences=((0, 30), (5, 26)))
    assert list(LookAhead([batch], view.reader(source))) == [batch]
    assert expected == [[30, 26]]
