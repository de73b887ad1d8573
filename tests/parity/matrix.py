"""The parity matrix: every stage under every ZeRO stage, precision, number of ranks, accumulation and
activation checkpointing, against the reference curve (`make parity`).

    python -m tests.parity [--only sft zero3 bf16] [--max-minutes 30]
    python -m tests.parity --write-golden

Results are lines of JSON; a second call runs what is missing or gave no curve, and takes no results of
other code. Exits with 1 when a cell gives no curve, or one beyond the tolerance of its precision.
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
    GROUPS,
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


# -- results that outlast a call -------------------------------------------------------------------


def code_digest() -> str:
    """Of everything that results depend on: our code, golden curves, the versions below.

    What stands above training cannot be imported by it (tests/test_import_rules.py), and is left out.
    """
    digest = hashlib.sha256(f"{version('torch')} {version('deepspeed')}".encode())
    above = {ROOT / "muomni" / room for room in ("inference", "evaluation", "cli")}
    files = [path for path in ROOT.glob("muomni/**/*.py") if above.isdisjoint(path.parents)]
    files += [*ROOT.glob("configs/deepspeed/*.json")]
    files += [*FOLDER.glob("*.json"), Path(__file__).with_name("runs.py")]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_results(path: Path, digest: str) -> dict[Cell, Result]:
    """Results of this very code; the last one of each cell counts."""
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


# -- the run -----------------------------------------------------------------------------------------


def check_golden(data: Path, stages: Iterable[str]) -> None:
    """Exit with a sentence when a golden curve is not what the reference gives here."""
    for stage in stages:
        for group in tqdm(GROUPS, desc=f"reference {stage}", leave=False, disable=None):
            live, golden = live_curve(stage, group, data), read_golden(stage)[group]
            worst = deviation(live.losses, golden.losses)
            if worst > REL_TOLERANCE:
                sys.exit(
                    f"the golden curve of {stage} with {group} micro-batches a step is {worst:.1e} off "
                    f"the reference; write it anew with python -m tests.parity --write-golden and say why"
                )


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """The cells of the default suite first, which cover most; in both halves the quick ones before others:
    few ranks, then few micro-batches.
    """
    first = set(default_suite())
    return sorted(
        cells, key=lambda cell: (cell not in first, cell.num_ranks, cell.num_accumulation)
    )


def run_all(cells: Iterable[Cell], data: Path, max_minutes: float) -> Iterator[Result]:
    """Run cells in ranks that stay warm for each world size; a failure becomes a result."""
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
                except Exception as error:  # of any kind: the cell failed, the others still run
                    yield Result(cell, error=f"{type(error).__name__}: {error}"[:500])
    finally:
        pool.close()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--only", nargs="+", default=[], metavar="LABEL",
        help="cells with all of these labels, as in: sft zero3 bf16 4x1 recomputed",
    )  # fmt: skip
    flags.add_argument("--max-minutes", type=float, default=math.inf, help="start no cell after")
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument(
        "--write-golden", action="store_true", help="write the golden curves anew and stop"
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
    print(f"{len(results)} of {len(all_cells())} cells ran, {len(failed)} failed; {DOCS}")
    for result in failed:
        print(f"  {result}")
    sys.exit(bool(failed))
