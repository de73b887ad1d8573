"""The deviation of a parity cell from the reference, and its tolerance."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parity.cells import Cell
from tests.parity.golden import read_golden
from tests.parity.runs import run_cell
from tests.ranks import RankPool

CELL_TIMEOUT_S = 1800.0  # generous: cells run in seconds, unless the machine is busy


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Maximum relative deviation from the reference at any step; docs/parity.md explains the values."""

    loss: float
    grad_norm: float


TOLERANCES = {
    "fp32": Tolerance(loss=2e-5, grad_norm=1e-3),
    "bf16": Tolerance(loss=2e-2, grad_norm=0.2),
    "fp16": Tolerance(loss=5e-3, grad_norm=0.05),
}


@dataclass(frozen=True, slots=True)
class Result:
    """Maximum relative deviation of a cell from the reference, or the error that it raised."""

    cell: Cell
    loss: float = math.inf
    grad_norm: float = math.inf
    error: str = ""

    @property
    def is_good(self) -> bool:
        limit = TOLERANCES[self.cell.precision]
        return not self.error and self.loss <= limit.loss and self.grad_norm <= limit.grad_norm

    def __str__(self) -> str:
        found = self.error or f"loss {self.loss:.1e}, gradient norm {self.grad_norm:.1e}"
        return f"{self.cell}: {found}"


def deviation(values: list[float], expected: list[float]) -> float:
    """Maximum relative deviation at any step; infinite for another length or non-finite values."""
    if len(values) != len(expected) or not all(map(math.isfinite, values)):
        return math.inf
    pairs = zip(values, expected, strict=True)
    return max(abs(value - reference) / abs(reference) for value, reference in pairs)


def measure(
    cell: Cell, pool: RankPool, data: Path, run: Path, changes: dict[str, Any] | None = None
) -> Result:
    """Run a cell on warm ranks and compare its curve; reraises what a rank raises."""
    curves = pool.run(
        run_cell, timeout_s=CELL_TIMEOUT_S, cell=cell, root=data, run=run, changes=changes
    )
    curve, golden = curves[0], read_golden(cell.stage)
    return Result(
        cell,
        loss=deviation(curve.losses, golden.losses),
        grad_norm=deviation(curve.grad_norms, golden.grad_norms),
    )
