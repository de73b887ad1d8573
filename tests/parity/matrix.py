"""The parity matrix: every stage with every ZeRO stage, precision, number of ranks, accumulation, and
activation checkpointing, compared with the reference curve (`make parity`).

    python -m tests.parity [--only sft zero3 bf16] [--max-minutes 30]
    python -m tests.parity --write-golden

Results are stored as JSON lines; a second call runs cells that are missing or raised an error, and ignores
results of other code. The exit code is 1 if a cell raises an error or exceeds its tolerance.
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from tests.parity.cells import Cell, all_cells, default_suite
from tests.parity.comparison import Result, deviation, measure
from tests.parity.golden import (
    FOLDER,
    REL_TOLERANCE,
    live_curve,
    read_golden,
    write_golden,
)
from tests.parity.runs import write_data
from tests.parity.table import write_table
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "parity.md"
RESULTS = ROOT / "build" / "parity.jsonl"


# -- stored results ----------------------------------------------------------------------------------


def code_digest() -> str:
    """Hash everything that results depend on: code, golden curves, and versions.

    Packages above training are excluded, as training cannot import them (tests/test_import_rules.py).
    """
    digest = hashlib.sha256(f"{version('torch')} {version('deepspeed')}".encode())
    above = {ROOT / "muomni" / name for name in ("inference", "evaluation", "pipeline", "cli")}
    files = [path for path in ROOT.glob("muomni/**/*.py") if above.isdisjoint(path.parents)]
    files += [*ROOT.glob("configs/deepspeed/*.json")]
    files += [*FOLDER.glob("*.json"), Path(__file__).with_name("runs.py")]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_results(path: Path, digest: str) -> dict[Cell, Result]:
    """Read the results of the code with this digest; the last one of each cell counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results = {}
    for content in map(json.loads, lines):
        if content.pop("code") == digest:
            cell = Cell(**content.pop("cell"))
            results[cell] = Result(cell, **content)
    return results


def append_result(path: Path, digest: str, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"code": digest, **asdict(result)}) + "\n")


# -- running cells -----------------------------------------------------------------------------------


def check_golden(data: Path, stages: Iterable[str]) -> None:
    """Exit with one sentence if a golden curve differs from the live reference."""
    for stage in tqdm(stages, desc="reference", leave=False, disable=None):
        live, golden = live_curve(stage, data), read_golden(stage)
        worst = deviation(live.losses, golden.losses)
        if worst > REL_TOLERANCE:
            sys.exit(
                f"the golden curve of {stage} deviates from the reference by {worst:.1e}; run "
                f"python -m tests.parity --write-golden and explain why"
            )


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Sort cells: the default suite first, as it covers most; then by ranks and micro-batches, fast first."""
    first = set(default_suite())
    return sorted(
        cells, key=lambda cell: (cell not in first, cell.num_ranks, cell.num_accumulation)
    )


def run_all(cells: Iterable[Cell], data: Path, max_minutes: float) -> Iterator[Result]:
    """Run cells on warm ranks, reused per world size; a failure becomes a result."""
    deadline = time.monotonic() + 60 * max_minutes
    pool = RankPool(1)
    try:
        for cell in cells:
            if time.monotonic() > deadline:
                return
            if pool.num_ranks != cell.num_ranks:
                pool.close()
                pool = RankPool(cell.num_ranks)
            with tempfile.TemporaryDirectory() as run:
                try:
                    yield measure(cell, pool, data, Path(run))
                except Exception as error:  # any kind: other cells still run
                    yield Result(cell, error=f"{type(error).__name__}: {error}"[:500])
    finally:
        pool.close()


def main() -> None:
    flags = argparse.ArgumentParser(description="Compare parity cells with the reference curves.")
    flags.add_argument(
        "--only", nargs="+", default=[], metavar="LABEL",
        help="only cells with all of these labels, for example: sft zero3 bf16 4x1 recomputed",
    )  # fmt: skip
    flags.add_argument(
        "--max-minutes", type=float, default=math.inf, help="start no cell after this time"
    )
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument(
        "--write-golden", action="store_true", help="rewrite the golden curves and exit"
    )
    arguments = flags.parse_args()
    if arguments.write_golden:
        with tempfile.TemporaryDirectory() as folder:
            write_golden(write_data(Path(folder)))
        return
    digest = code_digest()
    results = read_results(arguments.results, digest)
    wanted = [cell for cell in all_cells() if all(label in cell.labels for label in arguments.only)]
    missing = in_order(cell for cell in wanted if cell not in results or results[cell].error)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        check_golden(data, sorted({cell.stage for cell in missing}))
        with tqdm(total=len(wanted), initial=len(wanted) - len(missing), disable=None) as bar:
            for result in run_all(missing, data, arguments.max_minutes):
                append_result(arguments.results, digest, result)
                results[result.cell] = result
                bar.update()
                bar.set_postfix_str(str(result.cell))
                if not result.is_good:
                    bar.write(str(result))
    write_table(DOCS, results.values())
    failed = [result for result in results.values() if not result.is_good]
    print(f"{len(results)} of {len(all_cells())} cells ran, {len(failed)} failed; see {DOCS}")
    for result in failed:
        print(f"  {result}")
    sys.exit(bool(failed))
