"""Fixtures and hooks that all tests share."""

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: ranks and the test process share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.corpora import write_text_dataset, write_tokenizer
from tests.ranks import RankPool

# Serves both ranks and data loader workers.
multiprocessing.set_forkserver_preload(["tests.rank_imports"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one worker (`--dist loadgroup`), which reuses its warm ranks."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            group = item.path.relative_to(config.rootpath).as_posix()
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need more GPUs than there are: `gpu` needs one, `gpu(2)` two."""
    marker = item.get_closest_marker("gpu")
    if marker is not None:
        import torch

        num_needed = marker.args[0] if marker.args else 1
        if torch.cuda.device_count() < num_needed:
            pytest.skip(f"needs {num_needed} CUDA device{'s' if num_needed > 1 else ''}")


@pytest.fixture(scope="module", autouse=True)
def return_freed_memory() -> Iterator[None]:
    """Return freed memory to the system after each file; workers and their ranks share the machine."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a small text dataset and a tokenizer; tests that change it need one of their own."""
    root = tmp_path_factory.mktemp("data")
    write_text_dataset(root / "text")
    write_tokenizer(root / "tokenizer.model")
    return root


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """One warm rank, for tests that need DeepSpeed but no peer."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two warm ranks of one process group (tests/ranks.py shows how to use them)."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpu_rank() -> Iterator[RankPool]:
    """One warm rank with a GPU, for tests with the marker `gpu`."""
    pool = RankPool(1, device="cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_gpu_ranks() -> Iterator[RankPool]:
    """Two warm ranks, each with a GPU, for tests with the marker `gpu(2)`."""
    pool = RankPool(2, device="cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def three_ranks(
    request: pytest.FixtureRequest, one_rank: RankPool, two_ranks: RankPool
) -> Iterator[RankPool]:
    """Three warm ranks for the tests of one file (`_many_ranks`)."""
    yield from _many_ranks(3, request, one_rank, two_ranks)


@pytest.fixture(scope="module")
def four_ranks(
    request: pytest.FixtureRequest, one_rank: RankPool, two_ranks: RankPool
) -> Iterator[RankPool]:
    """Four warm ranks for the tests of one file (`_many_ranks`)."""
    yield from _many_ranks(4, request, one_rank, two_ranks)


def _many_ranks(num: int, request: pytest.FixtureRequest, *smaller: RankPool) -> Iterator[RankPool]:
    """A pool in place of smaller ones, which are closed first and restart on demand.

    Many ranks need much memory, so the files that start them share one worker.
    """
    marker = request.node.get_closest_marker("xdist_group")
    is_grouped = marker is not None and marker.args == ("many_ranks",)
    assert is_grouped, f'{request.path} needs pytestmark = pytest.mark.xdist_group("many_ranks")'
    pool = RankPool(num, instead_of=smaller)
    yield pool
    pool.close()
