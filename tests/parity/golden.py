"""Golden curves of the reference: one committed JSON file per stage.

Any change of these files belongs in CHANGELOG.md with the flag [numerics] or [order].
"""

import json
from functools import cache
from pathlib import Path

from tests.parity.cells import STAGES, Cell
from tests.parity.reference import Curve, reference_curve
from tests.parity.runs import parity_config

FOLDER = Path(__file__).parent / "golden"
# Other processors and torch versions sum in a different order.
REL_TOLERANCE = 1e-4
_DIGITS = 8


def live_curve(stage: str, root: Path) -> Curve:
    """Compute the reference curve, in one micro-batch per step, on the data of `write_data`."""
    cell = Cell(stage, 0, "fp32", 1, 1, is_checkpointing=False)
    return reference_curve(parity_config(cell, root), root / "run")[0]


@cache
def read_golden(stage: str) -> Curve:
    """Read the golden curve of a stage, which holds for every layout."""
    return Curve(**json.loads((FOLDER / f"{stage}.json").read_text(encoding="utf-8")))


def write_golden(root: Path) -> None:
    """Write the golden curves of all stages; `git diff` shows what changed."""
    FOLDER.mkdir(exist_ok=True)
    for stage in STAGES:
        curve = {
            name: [float(f"{value:.{_DIGITS}g}") for value in values]
            for name, values in live_curve(stage, root)._asdict().items()
        }
        text = json.dumps(curve, indent=1, allow_nan=False)
        (FOLDER / f"{stage}.json").write_text(f"{text}\n", encoding="utf-8")
