"""Print the tables of packages and stages in docs/architecture.md: `python scripts/package_table.py`.

`--check` fails if the tables in the page are outdated, `--write` updates them. Line counts may drift by 10 %,
so that small changes need no update.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.config.registry import STAGES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PRODUCT = ("muomni", "data_prep")
LINE_TOLERANCE = 0.1
# The second last cell of a row, if it is a number.
LINES = re.compile(r"(?<=\| )([\d,]+)(?= \|(?: [^|]*\|)?$)", re.MULTILINE)


def modules_by_package(root: Path) -> dict[str, list[Path]]:
    """Files of each package by its folder relative to `root`."""
    packages: dict[str, list[Path]] = {}
    for product in PRODUCT:
        for path in sorted((root / product).rglob("*.py")):
            packages.setdefault(path.parent.relative_to(root).as_posix(), []).append(path)
    return dict(sorted(packages.items()))


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def package_table(root: Path) -> str:
    """Package, number of modules without `__init__.py`, lines, and first line of the docstring."""
    rows = ["| package | modules | lines | holds |", "|---|---:|---:|---|"]
    total_modules = total_lines = 0
    for package, paths in modules_by_package(root).items():
        docstring = ast.get_docstring(ast.parse((root / package / "__init__.py").read_text()))
        modules = len(paths) - 1
        lines = sum(map(num_lines, paths))
        total_modules, total_lines = total_modules + modules, total_lines + lines
        summary = (docstring or "").partition("\n")[0]
        rows.append(f"| `{package}` | {modules} | {lines:,} | {summary} |")
    return "\n".join([*rows, f"| all | {total_modules} | {total_lines:,} | |"])


def stage_table() -> str:
    """The registry: data, upstream stages, and modules of each stage."""
    rows = [
        "| stage | trains | data | upstream | view | stage class |",
        "|---|---|---|---|---|---|",
    ]
    for row in STAGES.values():
        view = row.view.removeprefix("muomni.data.").replace(":", ".")
        stage = row.stage.removeprefix("muomni.training.").replace(":", ".")
        data, upstream = ", ".join(row.tasks), ", ".join(row.upstream) or "-"
        rows.append(
            f"| `{row.name}` | {row.summary} | {data} | {upstream} | `{view}` | `{stage}` |"
        )
    return "\n".join(rows)


def tables(root: Path) -> dict[str, str]:
    """The tables by the name of their markers."""
    return {"packages": package_table(root), "stages": stage_table()}


def insert(text: str, name: str, table: str) -> str:
    """Replace the text between the markers of a table; raises ValueError if a marker is missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{PAGE.name} has no markers '{begin}' and '{end}'")
    return text.partition(begin)[0] + f"{begin}\n{table}\n{end}" + text.partition(end)[2]


def is_current(page: str, updated: str) -> bool:
    """Whether the two texts agree, except for small differences in line counts."""
    if LINES.sub("", page) != LINES.sub("", updated):
        return False
    counts = [[int(n.replace(",", "")) for n in LINES.findall(text)] for text in (page, updated)]
    return all(
        abs(old - new) <= max(10, LINE_TOLERANCE * new) for old, new in zip(*counts, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if the page is outdated")
    action.add_argument("--write", action="store_true", help="update the page")
    arguments = parser.parse_args()
    if not (arguments.check or arguments.write):
        print("\n\n".join(tables(ROOT).values()))
        return
    page = PAGE.read_text(encoding="utf-8")
    updated = page
    for name, table in tables(ROOT).items():
        updated = insert(updated, name, table)
    if arguments.write:
        PAGE.write_text(updated, encoding="utf-8")
    elif not is_current(page, updated):
        sys.exit(f"{PAGE.name} is outdated; run: python scripts/package_table.py --write")


if __name__ == "__main__":
    main()
