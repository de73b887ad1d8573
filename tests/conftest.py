"""Fixtures that all tests share."""

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before anything imports torch: ranks and the test process share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.ranks import RankPool

# Four ranks and what they hold are much for one machine: one worker runs all the files that start them.
_FOUR_RANKS = ("tests/parity/test_matrix.py", "tests/training/engine/test_expert_parallel.py")

# The first one to ask starts the server, for ranks and workers of loaders alike.
multiprocessing.set_forkserver_preload(["tests.rank_imports"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to workers by file (`--dist loadfile`), files with four ranks go to one worker."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByRanks(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "four ranks" if file in _FOUR_RANKS else file

    return ByRanks(config, log)


@pytest.fixture(scope="module", autouse=True)
def freed_memory_goes_back() -> Iterator[None]:
    """To the system, after each file: workers of the suite and their ranks share what a machine has."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """A warm rank alone in its world, for what needs DeepSpeed but no peer."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two warm ranks of one process group (tests/ranks.py shows how to use them)."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four_ranks(
    request: pytest.FixtureRequest, one_rank: RankPool, two_ranks: RankPool
) -> Iterator[RankPool]:
    """Four warm ranks for the tests of one file. Pools of fewer end when they start, and start again."""
    file = request.path.relative_to(request.config.rootpath).as_posix()
    assert file in _FOUR_RANKS, f"name {file} beside the other files with four ranks"
    pool = RankPool(4, instead_of=(one_rank, two_ranks))
    yield pool
    pool.close()
