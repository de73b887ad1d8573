"""Fixtures that all tests share."""

import multiprocessing
import os
from collections.abc import Iterator

import pytest

# Before anything imports torch: ranks and the test process share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.ranks import RankPool

# The first one to ask starts the server, for ranks and workers of loaders alike.
multiprocessing.set_forkserver_preload(["tests.rank_imports"])


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
def four_ranks(one_rank: RankPool, two_ranks: RankPool) -> Iterator[RankPool]:
    """Four warm ranks for the tests of one file. Pools of fewer end when they start, and start again."""
    pool = RankPool(4, instead_of=(one_rank, two_ranks))
    yield pool
    pool.close()
