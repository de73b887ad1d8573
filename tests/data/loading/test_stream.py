"""Streams: reproducible batches, equal numbers of steps on all ranks, and resuming by counts."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.loading.loader import CountedBatches
from muomni.data.loading.stream import (
    Reader,
    StreamLoader,
    StreamOrder,
    StreamShard,
    read_shard,
    stream_shards,
)
from muomni.data.shards.source import Source
from muomni.data.shards.writer import SampleCost, ShardWriter
from muomni.data.views.base import Batch, View
from muomni.errors import ConfigError, DataError
from tests.io.http_folder import serve

NUM_SHARDS, NUM_SAMPLES = 5, 7


class NumberView(View[int]):
    """Samples are numbers; "bad" cannot be decoded; augmentation adds a random number."""

    augments = True

    def lengths(self, source: Source) -> np.ndarray:
        raise AssertionError("a stream must not need lengths")

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> int:
        if sample["txt"] == b"bad":
            raise DataError("bad number")
        assert random is not None
        return int(sample["txt"]) * 1000 + int(random.integers(1000))

    def collate(self, sequences: list[list[int]]) -> Batch:
        return {"numbers": torch.tensor([number for ids in sequences for number in ids])}


@pytest.fixture
def tars(tmp_path: Path) -> list[StreamShard]:
    return [write(tmp_path, i, range(i * NUM_SAMPLES, (i + 1) * NUM_SAMPLES)) for i in range(5)]


def write(folder: Path, number: int, values: Any) -> StreamShard:
    with ShardWriter(folder, f"x-{number:06d}.tar", "train") as writer:
        for position, value in enumerate(values):
            text = str(value).encode()
            writer.add(f"k{number}_{position}", [("txt", text)], "g", SampleCost())
    return StreamShard(str(writer.tar_path), position + 1)


def batches(loader: CountedBatches, count: int) -> list[list[int]]:
    return [batch["numbers"].tolist() for batch in itertools.islice(loader, count)]


def test_one_rank_sees_each_sample_once_per_epoch(tars: list[StreamShard]) -> None:
    order = StreamOrder(tars, 5, 3, Reader())
    assert order.steps_per_epoch == 7
    both = batches(StreamLoader(order, NumberView()), 14)
    epochs = [
        [number // 1000 for batch in part for number in batch] for part in (both[:7], both[7:])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(35))
    assert epochs[0] != epochs[1]
    # Augmentation also differs between epochs.
    assert len({number for batch in both for number in batch}) > 60


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [0, 1, 3, 8])
def test_resumed_stream_continues_with_the_next_batch(
    tars: list[StreamShard], num_workers: int, step: int
) -> None:
    order = StreamOrder(tars, 2, 3, Reader(1, 2), max(num_workers, 1), accumulation=2)
    straight = batches(StreamLoader(order, NumberView(), 0, num_workers), 24)
    resumed = batches(StreamLoader(order, NumberView(), step, num_workers), 24 - 2 * step)
    assert resumed == straight[2 * step :]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 40),
)
def test_position_of_a_worker_follows_from_counts(
    sizes: list[int], num_ranks: int, num_workers: int, batch_size: int, num_batches: int
) -> None:
    shards = [StreamShard(f"{i}.tar", size) for i, size in enumerate(sizes)]
    seen: Counter[str] = Counter()
    steps = set()
    for rank in range(num_ranks):
        order = StreamOrder(shards, batch_size, 1, Reader(rank, num_ranks), num_workers)
        steps.add(order.steps_per_epoch)
        for worker in range(num_workers):
            mine = order.shards_of(4, worker)
            seen.update(shard.url for shard in mine)
            number, skip = order.start(4, worker, num_batches)
            read = sum(mine[i % len(mine)].num_samples for i in range(number)) + skip
            assert read == num_batches * batch_size
            assert 0 <= skip < mine[number % len(mine)].num_samples
    assert len(steps) == 1
    assert set(seen) == {shard.url for shard in shards}
    if len(shards) >= num_ranks * num_workers:
        assert set(seen.values()) == {1}


def test_bad_samples_of_a_stream_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write(tmp_path, 0, [1, "bad", 3, "bad"])
    order = StreamOrder([shard], 2, 0, Reader())
    loader = StreamLoader(order, NumberView())
    assert [[n // 1000 for n in batch] for batch in batches(loader, 2)] == [[1], [3]]
    num_samples, bad = loader.take_read()
    assert num_samples == 4 and [each.reason for each in bad] == ["bad number"] * 2
    assert "dropped sample k0_1" in caplog.text


def test_shards_are_read_from_pipes_and_http(tars: list[StreamShard], tmp_path: Path) -> None:
    expected = [sample["txt"] for sample in read_shard(tars[1])]
    assert expected == [str(n).encode() for n in range(7, 14)]
    pipe = StreamShard(f"pipe:cat '{tars[1].url}'", NUM_SAMPLES)
    assert [sample["txt"] for sample in read_shard(pipe)] == expected
    with serve(tmp_path) as server:
        remote = StreamShard(f"{server.url}/x-000001.tar", NUM_SAMPLES)
        assert [sample["txt"] for sample in read_shard(remote)] == expected


@pytest.mark.parametrize("url", ["/nowhere/x.tar", "pipe:exit 3", "nothing://x.tar"])
def test_error_names_an_unreadable_shard(url: str) -> None:
    with pytest.raises(DataError, match=url):
        list(read_shard(StreamShard(url, 1)))


def test_pickles_are_not_decoded(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x.tar", "train") as writer:
        writer.add("a", [("pyd", b"cos\nsystem\n(S'false'\ntR.")], "g", SampleCost())
    [sample] = read_shard(StreamShard(str(writer.tar_path), 1))
    assert isinstance(sample["pyd"], bytes)


def test_truncated_shard_logs_a_warning(
    tars: list[StreamShard], caplog: pytest.LogCaptureFixture
) -> None:
    content = Path(tars[0].url).read_bytes()
    Path(tars[0].url).write_bytes(content[: 2 * 1024])  # at a sample boundary
    assert len(list(read_shard(tars[0]))) == 2
    assert "has 2 samples, expected 7" in caplog.text


def test_brace_patterns_are_expanded() -> None:
    shards = stream_shards(["s3://b/x-{000..002}.tar", "pipe:cat y.tar"], 10)
    urls = ["s3://b/x-000.tar", "s3://b/x-001.tar", "s3://b/x-002.tar", "pipe:cat y.tar"]
    assert [shard.url for shard in shards] == urls
    with pytest.raises(ConfigError, match="at least one shard"):
        stream_shards([], 10)
    with pytest.raises(ConfigError, match=r"lists a\.tar twice"):
        stream_shards(["a.tar", "{a,b}.tar"], 10)
