"""The table of docs/parity.md: the deviation of each cell that ran."""

import math
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from muomni.run_folder import provenance
from tests.parity.cells import PRECISIONS, STAGES, ZERO_STAGES, Cell, all_cells
from tests.parity.comparison import Result

BEGIN, END = "<!-- table: begin (make parity) -->", "<!-- table: end -->"


def render(results: Iterable[Result], day: date) -> str:
    """Render one row per stage and precision and one column per ZeRO stage, each over all layouts."""
    by_cell = {result.cell: result for result in results}
    num_good = sum(result.is_good for result in by_cell.values())
    versions = provenance()["versions"]
    lines = [
        f"{day:%Y-%m-%d}, `make parity`, torch {versions['torch']}, DeepSpeed {versions['deepspeed']}: "
        f"{len(by_cell)} of {len(all_cells())} cells ran, {num_good} of them within the tolerance.",
        "",
        "| stage | precision | " + " | ".join(f"ZeRO {zero}" for zero in ZERO_STAGES) + " |",
        "|---|---|" + "---|" * len(ZERO_STAGES),
    ]
    for stage in STAGES:
        for precision in PRECISIONS:
            entries = (_entry(stage, zero, precision, by_cell) for zero in ZERO_STAGES)
            lines.append(f"| {stage} | {precision} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _entry(stage: str, zero: int, precision: str, by_cell: dict[Cell, Result]) -> str:
    cells = [
        cell
        for cell in all_cells()
        if (cell.stage, cell.zero, cell.precision) == (stage, zero, precision)
    ]
    found = [by_cell[cell] for cell in cells if cell in by_cell]
    if not found:
        return "not run"
    failed = [result for result in found if not result.is_good]
    worst = max(result.loss for result in found)
    text = f"{worst:.1e}" if math.isfinite(worst) else "no curve"
    if failed:
        text = f"**FAILS** in {len(failed)}, {text}"
    return text if len(found) == len(cells) else f"{text} ({len(found)} of {len(cells)})"


def write_table(path: Path, results: Iterable[Result]) -> None:
    """Replace the text between the markers of the page."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table = render(results, date.today())
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
