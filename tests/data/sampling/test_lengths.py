"""Measured lengths: one process measures, others wait for its file."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muomni.data.sampling.lengths import measured_lengths
from muomni.data.shards import parallel
from muomni.data.shards.source import Source
from tests.corpora import write_text_dataset


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source([write_text_dataset(tmp_path / "text")], "train")


def text_length(sample: dict[str, Any]) -> int:
    return len(sample["txt"])


def test_a_process_that_comes_later_reads_the_file_of_the_first(source: Source) -> None:
    is_measuring, may_go_on = threading.Event(), threading.Event()
    found: dict[str, np.ndarray] = {}

    def slow(sample: dict[str, Any]) -> int:
        is_measuring.set()
        assert may_go_on.wait(20)
        return text_length(sample)

    def never(sample: dict[str, Any]) -> int:
        raise AssertionError("measured twice")

    def measure(name: str, function: Any) -> None:
        found[name] = measured_lengths(source, function, "bytes").all()

    threads = [threading.Thread(target=measure, args=("first", slow))]
    threads[0].start()
    assert is_measuring.wait(20)
    threads.append(threading.Thread(target=measure, args=("second", never)))
    threads[1].start()
    may_go_on.set()
    for thread in threads:
        thread.join(30)
    assert np.array_equal(found["first"], found["second"]) and len(found["first"]) == len(source)
    assert not list(source.manifests[0].root.rglob("*.lock"))


def test_workers_measure_what_one_process_does(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_RANGE", 9)
    by_workers = measured_lengths(source, text_length, "by workers", num_workers=2).all()
    assert np.array_equal(by_workers, measured_lengths(source, text_length, "alone").all())
    assert len(by_workers) == len(source) > 2 * 9


def test_a_read_only_folder_gets_no_file(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    lengths = measured_lengths(source, text_length, "read-only").all()
    assert lengths.min() > 0
    assert not list(source.manifests[0].root.rglob(".lengths-*"))
