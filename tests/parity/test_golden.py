"""Test that golden curves match the live reference, and that the reference learns."""

from pathlib import Path

import pytest

from tests.parity.cells import STAGES
from tests.parity.comparison import TOLERANCES
from tests.parity.golden import GROUPS, REL_TOLERANCE, live_curve, read_golden
from tests.parity.runs import NUM_STEPS


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_golden_curves_match_the_live_reference(stage: str, group: int, parity_data: Path) -> None:
    """`make parity` checks the other numbers of micro-batches, too."""
    live, golden = live_curve(stage, group, parity_data), read_golden(stage)[group]
    assert live.losses == pytest.approx(golden.losses, rel=REL_TOLERANCE)
    assert live.grad_norms == pytest.approx(golden.grad_norms, rel=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_golden_curves_would_reveal_a_run_that_does_not_learn(stage: str) -> None:
    """The loss falls by several times the widest tolerance, and depends on the micro-batches per step."""
    curves = read_golden(stage)
    assert tuple(curves) == GROUPS
    widest = max(tolerance.loss for tolerance in TOLERANCES.values())
    largest = curves[max(GROUPS)].losses
    assert len(largest) == NUM_STEPS
    assert largest[-1] < largest[0] * (1 - 2 * widest)
    assert len({curve.losses[0] for curve in curves.values()}) == len(GROUPS)
