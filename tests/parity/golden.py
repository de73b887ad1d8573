"""Golden curves of the reference: one committed JSON file per stage.

Any change of these files belongs in CHANGELOG.md with the flag [numerics] or [order].
"""

import json
from functools import cache
from pathlib import Path

from tests.parity.cells import STAGES, Cell, all_cells
from tests.parity.reference import Curve, reference_curve
from tests.parity.runs import parity_config

FOLDER = Path(__file__).parent / "golden"
GROUPS = tuple(sorted({cell.group for cell in all_cells()}))
# Other processors and torch versions sum in a different order.
REL_TOLERANCE = 1e-4
_DIGITS = 8


def live_curve(stage: str, group: int, root: Path) -> Curve:
    """Compute the reference curve with `group` micro-batches per step, on the data of `write_data`."""
    cell = Cell(stage, 0, "fp32", 1, group, is_checkpointing=False)
    return reference_curve(parity_config(cell, root), root / "run")[0]


@cache
def read_golden(stage: str) -> dict[int, Curve]:
    """Read the golden curves of a stage, keyed by micro-batches per step."""
    content = json.loads((FOLDER / f"{stage}.json").read_text(encoding="utf-8"))
    return {int(group): Curve(**curve) for group, curve in content.items()}


def write_golden(root: Path) -> None:
    """Write the golden curves of all stages; `git diff` shows what changed."""
    FOLDER.mkdir(exist_ok=True)
    for stage in STAGES:
        curves = {}
        for group in GROUPS:
            curve = live_curve(stage, group, root)
            curves[group] = {
                name: [float(f"{value:.{_DIGITS}g}") for value in values]
                for name, values in curve._asdict().items()
            }
        text = json.dumps(curves, indent=1, allow_nan=False)
        (FOLDER / f"{stage}.json").write_text(f"{text}\n", encoding="utf-8")
