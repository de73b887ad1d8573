"""Test that golden curves match the live reference, and that the reference learns."""

from pathlib import Path

import pytest

from tests.parity.cells import STAGES
from tests.parity.comparison import TOLERANCES
from tests.parity.golden import REL_TOLERANCE, live_curve, read_golden
from tests.parity.runs import NUM_STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_golden_curves_match_the_live_reference(stage: str, parity_data: Path) -> None:
    live, golden = live_curve(stage, parity_data), read_golden(stage)
    assert live.losses == pytest.approx(golden.losses, rel=REL_TOLERANCE)
    assert live.grad_norms == pytest.approx(golden.grad_norms, rel=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_golden_curves_would_reveal_a_run_that_does_not_learn(stage: str) -> None:
    """The loss falls by several times the widest tolerance."""
    losses = read_golden(stage).losses
    widest = max(tolerance.loss for tolerance in TOLERANCES.values())
    assert len(losses) == NUM_STEPS
    assert losses[-1] < losses[0] * (1 - 2 * widest)
