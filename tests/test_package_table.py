"""Size limits of packages and files, and the generated tables of docs/architecture.md."""

from pathlib import Path

import pytest

from muomni.config.registry import STAGES
from scripts.package_table import (
    PAGE,
    ROOT,
    insert,
    is_current,
    modules_by_package,
    num_lines,
    package_table,
    stage_table,
    tables,
)

MAX_MODULES = 14
MAX_LINES, MIN_LINES = 450, 20
# One module per corpus layout, stage, or verb: as many, and as short, as they need to be.
UNLIMITED_MODULES = {"data_prep/readers", "muomni/cli"}
SHORT_MODULES = {
    "data_prep/readers",
    "muomni/evaluation/stages",
    "muomni/cli/data.py",  # a verb that is implemented by data_prep
    "muomni/distributed/deepspeed_import.py",  # must run before any import of DeepSpeed
}


def large_packages(root: Path) -> list[str]:
    """Packages with more than MAX_MODULES modules."""
    return [
        package
        for package, files in modules_by_package(root).items()
        if len(files) - 1 > MAX_MODULES and package not in UNLIMITED_MODULES
    ]


def odd_sized_files(root: Path) -> list[str]:
    """Modules with more than MAX_LINES or fewer than MIN_LINES lines."""
    found = []
    for package, files in modules_by_package(root).items():
        for path in files:
            name, lines = path.relative_to(root).as_posix(), num_lines(path)
            is_exempt = path.stem in ("__init__", "__main__") or {package, name} & SHORT_MODULES
            if lines > MAX_LINES or (lines < MIN_LINES and not is_exempt):
                found.append(f"{name}: {lines} lines")
    return found


def write_package(root: Path, package: str, num_modules: int, lines: int = 100) -> None:
    for folder in ("muomni", "data_prep", package):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "__init__.py").write_text('"""Things.\n\nMore."""\n')
    for number in range(num_modules):
        (root / package / f"module_{number}.py").write_text("x = 1\n" * lines)


def test_packages_are_small() -> None:
    assert large_packages(ROOT) == []


def test_large_package_is_found(tmp_path: Path) -> None:
    write_package(tmp_path, "muomni/many", MAX_MODULES + 1)
    write_package(tmp_path, "muomni/few", MAX_MODULES)
    write_package(tmp_path, "data_prep/readers", MAX_MODULES + 1)
    assert large_packages(tmp_path) == ["muomni/many"]


def test_files_have_a_reasonable_size() -> None:
    assert odd_sized_files(ROOT) == []


@pytest.mark.parametrize(("lines", "is_odd"), [(19, True), (20, False), (450, False), (451, True)])
def test_odd_size_is_found(lines: int, is_odd: bool, tmp_path: Path) -> None:
    write_package(tmp_path, "muomni/things", 1, lines)
    expected = [f"muomni/things/module_0.py: {lines} lines"] if is_odd else []
    assert odd_sized_files(tmp_path) == expected


def test_short_readers_are_allowed(tmp_path: Path) -> None:
    write_package(tmp_path, "data_prep/readers", 1, 5)
    assert odd_sized_files(tmp_path) == []


@pytest.mark.parametrize("name", ["packages", "stages"])
def test_table_is_current(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    updated = insert(page, name, tables(ROOT)[name])
    assert is_current(page, updated), "run: python scripts/package_table.py --write"


def test_package_table_counts_modules_and_lines(tmp_path: Path) -> None:
    write_package(tmp_path, "muomni/things", 2, 600)
    rows = package_table(tmp_path).splitlines()
    assert "| `muomni/things` | 2 | 1,203 | Things. |" in rows
    assert rows[-1] == "| all | 2 | 1,209 | |"


def test_every_package_has_a_docstring() -> None:
    assert [row for row in package_table(ROOT).splitlines()[2:-1] if row.endswith("|  |")] == []


def test_stage_table_has_every_stage() -> None:
    rows = stage_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(STAGES)


@pytest.mark.parametrize(
    ("changed", "current"),
    [
        ("| `a` | 2 | 1,000 | Things. |", True),
        ("| `a` | 2 | 1,090 | Things. |", True),
        ("| `a` | 2 | 1,200 | Things. |", False),
        ("| `a` | 3 | 1,000 | Things. |", False),
        ("| `a` | 2 | 1,000 | Others. |", False),
    ],
)
def test_only_line_counts_may_drift(changed: str, current: bool) -> None:
    assert is_current("text\n| `a` | 2 | 1,000 | Things. |\n", f"text\n{changed}\n") == current


def test_missing_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no markers '<!-- packages:begin -->'"):
        insert("a page", "packages", "a table")
