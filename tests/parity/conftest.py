"""What the parity tests share: data of all stages, and four ranks beside one and two."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity.runs import write_data
from tests.ranks import RankPool


@pytest.fixture(scope="session")
def parity_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def pools(one_rank: RankPool, two_ranks: RankPool) -> Iterator[dict[int, RankPool]]:
    """Warm ranks by their number; a pool starts its ranks when it is first used."""
    four_ranks = RankPool(4)
    yield {1: one_rank, 2: two_ranks, 4: four_ranks}
    four_ranks.close()
