"""The loss curve does not depend on ZeRO stage, precision, ranks, accumulation, or recomputation.

These cells cover all pairs of settings; `make parity` runs the full matrix.
"""

from pathlib import Path

import pytest

from tests.parity.cells import Cell, default_suite
from tests.parity.comparison import TOLERANCES, measure
from tests.ranks import RankPool

pytestmark = pytest.mark.xdist_group("many_ranks")
CELLS = sorted(default_suite(), key=lambda cell: cell.num_ranks)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_curve_matches_the_reference(
    cell: Cell, parity_data: Path, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    result = measure(cell, pools[cell.num_ranks], parity_data, tmp_path)
    assert result.is_good, f"{result} exceeds {TOLERANCES[cell.precision]}"
