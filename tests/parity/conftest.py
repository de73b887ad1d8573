"""Fixtures of the parity tests: data of all stages, and rank pools by size."""

from pathlib import Path

import pytest

from tests.parity.runs import write_data
from tests.ranks import RankPool


@pytest.fixture(scope="session")
def parity_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def pools(one_rank: RankPool, two_ranks: RankPool, three_ranks: RankPool) -> dict[int, RankPool]:
    """Warm ranks, keyed by their number; a pool starts its ranks on first use."""
    return {1: one_rank, 2: two_ranks, 3: three_ranks}
