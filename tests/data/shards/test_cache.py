"""The shard cache: downloads, faults, sharing between processes, and eviction."""

import fcntl
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.shards.cache import RemoteShard, ShardCache
from muomni.errors import DataError
from muomni.io.remote_folder import RemoteFolder
from tests.io.http_folder import HttpFolder, Spoil, serve

SIZE = 200_000
CHUNK = 64 << 10
_SPAWN = multiprocessing.get_context("spawn")


def put(folder: Path, name: str, content: bytes) -> RemoteShard:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return RemoteShard(name, hashlib.sha256(content).hexdigest(), len(content))


def shards(folder: Path, count: int) -> list[RemoteShard]:
    return [put(folder, f"train/{i}.tar", bytes([i]) * SIZE) for i in range(count)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpFolder]:
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as state:
        yield state


def cache_of(server: HttpFolder, max_bytes: int = 10 * SIZE) -> ShardCache:
    remote = RemoteFolder(server.url, num_attempts=3, first_wait_s=0.01)
    return ShardCache(server.folder.parent / "cache", max_bytes, remote, CHUNK)


def content(cache: ShardCache, shard: RemoteShard) -> bytes:
    descriptor = cache.open(shard)
    try:
        return os.pread(descriptor, SIZE + 1, 0)
    finally:
        os.close(descriptor)


def files(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in (cache.folder / "shards").iterdir())


def cached(cache: ShardCache, listed: list[RemoteShard]) -> list[int]:
    return [i for i, s in enumerate(listed) if f"{s.sha256}.tar" in files(cache)]


# -- download --------------------------------------------------------------------------------------
def test_shard_is_downloaded_once_in_ranges(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    cache = cache_of(server)
    assert content(cache, shard) == content(cache, shard) == bytes(SIZE)
    assert server.requests["train/0.tar"] == 4  # ranges of 64 KiB
    assert server.bytes_sent["train/0.tar"] == SIZE
    assert files(cache) == [f"{shard.sha256}.tar"]


def test_equal_names_with_different_content_do_not_collide(server: HttpFolder) -> None:
    train = put(server.folder, "train/00000.tar", b"train" * 1000)
    val = put(server.folder, "val/00000.tar", b"val!!" * 1000)
    cache = cache_of(server)
    assert content(cache, train) == b"train" * 1000
    assert content(cache, val) == b"val!!" * 1000


def test_server_without_ranges_works(server: HttpFolder) -> None:
    server.has_ranges = False
    [shard] = shards(server.folder, 1)
    assert content(cache_of(server), shard) == bytes(SIZE)
    assert server.requests["train/0.tar"] == 1


@pytest.mark.parametrize("spoil", ["refuse", "cut"])
def test_temporary_faults_are_retried(server: HttpFolder, spoil: Spoil) -> None:
    [shard] = shards(server.folder, 1)
    server.fail_first(2, spoil)
    assert content(cache_of(server), shard) == bytes(SIZE)


def test_permanent_fault_is_reported_and_keeps_the_part(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    faults: list[Spoil | None] = [None, None, "refuse", "refuse", "refuse"]
    answers = iter(faults)
    server.fault = lambda path: next(answers)
    cache = cache_of(server)
    with pytest.raises(DataError, match=rf"cannot read {server.url}/train/0\.tar .*503"):
        cache.open(shard)
    assert files(cache) == [f"{shard.sha256}.{SIZE}.part"]
    server.fault = lambda path: None
    server.bytes_sent.clear()
    assert content(cache, shard) == bytes(SIZE)
    assert server.bytes_sent["train/0.tar"] == SIZE - 2 * CHUNK


def test_damaged_response_is_downloaded_again(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    server.fail_first(1, "damage")
    assert content(cache_of(server), shard) == bytes(SIZE)


def test_damaged_remote_file_is_rejected_and_leaves_no_files(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    server.fault = lambda path: "damage"
    cache = cache_of(server)
    with pytest.raises(DataError, match=r"train/0\.tar does not match its manifest"):
        cache.open(shard)
    assert files(cache) == []


def test_truncated_remote_file_is_rejected(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    (server.folder / "train/0.tar").write_bytes(bytes(1000))
    with pytest.raises(DataError, match=r"train/0\.tar"):
        cache_of(server).open(shard)


def test_missing_shard_is_rejected_without_retries(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    (server.folder / "train/0.tar").unlink()
    with pytest.raises(DataError, match=rf"{server.url}/train/0\.tar is missing"):
        cache_of(server).open(shard)
    assert server.requests["train/0.tar"] == 1


def test_invalid_digest_does_not_become_a_path(server: HttpFolder) -> None:
    with pytest.raises(DataError, match="no SHA-256"):
        cache_of(server).open(RemoteShard("train/0.tar", "../../x", 10))


def _open_and_hold(cache: ShardCache, shard: RemoteShard) -> None:
    cache.open(shard)
    print("open", flush=True)
    time.sleep(60)


def _open(cache: ShardCache, shard: RemoteShard) -> None:
    assert content(cache, shard) == bytes(SIZE)


def test_processes_download_a_shard_once(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    server.bytes_per_second = 300_000
    cache = cache_of(server)
    processes = [_SPAWN.Process(target=_open, args=(cache, shard)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert server.bytes_sent["train/0.tar"] == SIZE
    assert files(cache) == [f"{shard.sha256}.tar"]


def test_killed_download_is_continued(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    server.bytes_per_second = 100_000
    cache = cache_of(server)
    part = cache.folder / "shards" / f"{shard.sha256}.{SIZE}.part"
    process = _SPAWN.Process(target=_open, args=(cache, shard))
    process.start()
    assert process.pid is not None
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    downloaded = part.stat().st_size
    assert 0 < downloaded < SIZE
    server.bytes_per_second = None
    time.sleep(0.3)  # lets the server notice the closed connection
    server.bytes_sent.clear()
    assert content(cache, shard) == bytes(SIZE)
    assert server.bytes_sent["train/0.tar"] == SIZE - downloaded
    assert files(cache) == [f"{shard.sha256}.tar"]


# -- eviction --------------------------------------------------------------------------------------
def test_least_recently_used_shard_is_evicted(server: HttpFolder) -> None:
    listed = shards(server.folder, 4)
    cache = cache_of(server, 3 * SIZE)
    for i in (0, 1, 2, 0, 3):
        content(cache, listed[i])
        time.sleep(0.01)  # different modification times
    assert cached(cache, listed) == [0, 2, 3]


def test_shard_with_the_farthest_next_use_is_evicted(server: HttpFolder) -> None:
    listed = shards(server.folder, 4)
    cache = cache_of(server, 3 * SIZE)
    for i in (0, 1, 2):
        content(cache, listed[i])
    cache.expect([listed[i] for i in (3, 0, 2, 1)])
    content(cache, listed[3])
    assert cached(cache, listed) == [0, 2, 3]


def test_expectations_of_other_processes_count(server: HttpFolder) -> None:
    listed = shards(server.folder, 3)
    reader, planner = cache_of(server, 2 * SIZE), cache_of(server, 2 * SIZE)
    planner.expect([listed[0]])
    for i in (0, 1, 2):
        content(reader, listed[i])
        time.sleep(0.01)
    assert cached(reader, listed) == [0, 2]
    planner.close()  # like the end of the process
    for i in (2, 1):
        content(reader, listed[i])
        time.sleep(0.01)
    assert cached(reader, listed) == [1, 2]
    assert list((reader.folder / "expected").iterdir()) == []


def test_open_shards_are_not_evicted_even_above_the_limit(
    server: HttpFolder, caplog: pytest.LogCaptureFixture
) -> None:
    listed = shards(server.folder, 3)
    cache = cache_of(server, 2 * SIZE)
    held = [cache.open(listed[i]) for i in (0, 1)]
    content(cache, listed[2])
    assert cached(cache, listed) == [0, 1, 2]
    assert "raise data.cache_gb" in caplog.text
    for descriptor in held:
        os.close(descriptor)
    content(cache, put(server.folder, "train/x.tar", b"x" * SIZE))
    assert len(files(cache)) == 2


def test_shard_of_a_running_process_is_not_evicted_until_it_dies(server: HttpFolder) -> None:
    listed = shards(server.folder, 3)
    cache = cache_of(server, 2 * SIZE)
    process = _SPAWN.Process(target=_open_and_hold, args=(cache, listed[0]))
    process.start()
    tar = cache.folder / "shards" / f"{listed[0].sha256}.tar"
    while not (tar.exists() and _is_held(tar)):
        time.sleep(0.01)
    for i in (1, 2, 1, 2):
        content(cache, listed[i])
    assert 0 in cached(cache, listed)
    process.kill()
    process.join()
    for i in (1, 2):
        content(cache, listed[i])
    assert cached(cache, listed) == [1, 2]


def _is_held(tar: Path) -> bool:
    with tar.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_part_counts_in_full_and_can_be_evicted(server: HttpFolder) -> None:
    listed = shards(server.folder, 2)
    cache = cache_of(server, int(1.5 * SIZE))
    server.fault = lambda path: "refuse"
    with pytest.raises(DataError):
        cache.open(listed[0])
    server.fault = lambda path: None
    content(cache, listed[1])
    assert files(cache) == [f"{listed[1].sha256}.tar"]


def test_shard_larger_than_the_cache_is_rejected(server: HttpFolder) -> None:
    [shard] = shards(server.folder, 1)
    with pytest.raises(DataError, match=r"more than data\.cache_gb"):
        cache_of(server, SIZE - 1).open(shard)


def test_prefetching_does_not_evict_shards_needed_sooner(server: HttpFolder) -> None:
    listed = shards(server.folder, 3)
    cache = cache_of(server, 2 * SIZE)
    for i in (0, 1):
        content(cache, listed[i])
    cache.expect([listed[i] for i in (0, 1, 2)])
    assert not cache.prefetch(listed[2], 2)
    cache.expect([listed[i] for i in (1, 2, 0)])
    assert cache.prefetch(listed[2], 1)
    assert cached(cache, listed) == [1, 2]


def test_unusable_cache_folder_is_rejected(server: HttpFolder) -> None:
    (server.folder / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        ShardCache(server.folder / "file", SIZE, RemoteFolder(server.url))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 4))
def test_limit_holds_for_any_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], num_included: int
) -> None:
    folder = tmp_path_factory.mktemp("remote")
    listed = [put(folder, f"{i}.tar", bytes([i]) * 1000) for i in range(5)]
    cache = ShardCache(folder / "cache", num_included * 1000, RemoteFolder(f"file://{folder}"))
    for i in order:
        assert content(cache, listed[i]) == bytes([i]) * 1000
        assert (
            sum(f.stat().st_size for f in (folder / "cache/shards").iterdir())
            <= num_included * 1000
        )
        assert i in cached(cache, listed)


def test_threads_and_pickles_share_the_cache(server: HttpFolder) -> None:
    listed = shards(server.folder, 3)
    cache = cache_of(server, SIZE)
    cache.expect(listed)
    copy = pickle.loads(pickle.dumps(cache))
    failures: list[BaseException] = []

    def read(which: ShardCache) -> None:
        try:
            for _ in range(3):
                for number, shard in enumerate(listed):
                    assert content(which, shard) == bytes([number]) * SIZE
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(which,)) for which in (cache, copy)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
