"""Test the choice of cells, the stored results, and the table."""

import math
from dataclasses import astuple
from datetime import date
from itertools import combinations
from pathlib import Path

import pytest

from tests.parity.cells import STAGES, Cell, all_cells, covering, default_suite
from tests.parity.comparison import Result, deviation
from tests.parity.matrix import append_result, in_order, read_results
from tests.parity.table import BEGIN, END, render, write_table

CELL = Cell("codec", 3, "bf16", 2, 2, is_checkpointing=True)


def pairs(cells: list[Cell]) -> set[object]:
    labels = [astuple(cell) for cell in cells]
    return {pair for values in labels for pair in combinations(enumerate(values), 2)}


def test_matrix_has_every_setting_of_every_stage() -> None:
    assert len(all_cells()) == len(set(all_cells())) == 7 * 4 * 3 * 4 * 2 * 2
    assert str(CELL) == "codec-zero3-bf16-2x2-recomputed" and CELL.units_per_micro_batch == 2


@pytest.mark.parametrize("stage", STAGES)
def test_covering_subset_has_all_pairs_in_few_cells(stage: str) -> None:
    cells = [cell for cell in all_cells() if cell.stage == stage]
    chosen = covering(cells)
    assert pairs(chosen) == pairs(cells)
    assert len(chosen) <= 16 < len(cells)


def test_default_suite_is_small_and_has_all_pairs_on_two_ranks() -> None:
    suite = default_suite()
    assert pairs([cell for cell in suite if cell.num_ranks < 3]) == pairs(
        [cell for cell in all_cells() if cell.num_ranks < 3]
    )
    three = [cell for cell in suite if cell.num_ranks == 3]
    assert {cell.stage for cell in three} == set(STAGES)
    assert {cell.zero for cell in three} == {0, 1, 2, 3}
    assert {cell.precision for cell in three} == {"fp32", "bf16", "fp16"}
    assert len(suite) == len(set(suite)) <= 40
    assert set(in_order(all_cells())[: len(suite)]) == set(suite)


def test_deviation_is_the_maximum_over_steps() -> None:
    assert deviation([2.0, 4.1], [2.0, 4.0]) == pytest.approx(0.025)
    assert deviation([2.0], [2.0, 4.0]) == math.inf
    assert deviation([2.0, math.nan], [2.0, 4.0]) == math.inf
    assert Result(CELL, 0.001, 0.001).is_good
    assert not Result(CELL, 0.5, 0.001).is_good
    assert not Result(CELL, 0.001, 5.0).is_good
    assert not Result(CELL, error="RankError: gone").is_good


def test_results_of_other_code_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "build" / "parity.jsonl"
    for result in (Result(CELL, error="RankError: gone"), Result(CELL, 0.01, 0.02)):
        append_result(path, "one", result)
    assert read_results(path, "one") == {CELL: Result(CELL, 0.01, 0.02)}
    assert read_results(path, "other") == {}


def test_table_shows_the_worst_layout_failures_and_missing_cells(tmp_path: Path) -> None:
    good = [
        Result(Cell("codec", 1, "bf16", num_ranks, num_accumulation, again), 0.001 * num_ranks, 0.0)
        for num_ranks in (1, 2, 3, 4)
        for num_accumulation in (1, 2)
        for again in (False, True)
    ]
    page = tmp_path / "parity.md"
    page.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    write_table(page, [*good, Result(CELL, 0.5, 0.1)])
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| codec | bf16"))
    assert (
        row == "| codec | bf16 | not run | 4.0e-03 | not run | **FAILS** in 1, 5.0e-01 (1 of 16) |"
    )
    assert "17 of 1344 cells ran, 16 of them within" in text
    gone = render([Result(CELL, error="RankError: gone")], date(2026, 1, 2))
    assert "**FAILS** in 1, no curve (1 of 16)" in gone and gone.startswith("2026-01-02, ")
