"""No file escapes pytest or ruff."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Test files that need a package which no extra installs.
OPTIONAL = {"tests/data/shards/test_energon.py": "megatron"}
SKIPPED_FOLDERS = {".venv", "build"}


def python_files(root: Path, pattern: str = "*.py") -> set[str]:
    """Paths relative to `root`, without environments and build outputs."""
    paths = (path.relative_to(root) for path in root.rglob(pattern))
    return {path.as_posix() for path in paths if path.parts[0] not in SKIPPED_FOLDERS}


def uncollected(root: Path) -> set[str]:
    """Test files below `root` in which pytest with our settings collects nothing."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(root), "--config-file", str(ROOT / "pyproject.toml")]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    outcome = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    collected = re.findall(r"^(\S+\.py): \d+$", outcome.stdout, re.MULTILINE)
    return python_files(root, "test_*.py") - set(collected)


def test_pytest_collects_every_test_file() -> None:
    absent = {file for file, package in OPTIONAL.items() if find_spec(package) is None}
    assert uncollected(ROOT) == absent


def test_pytest_collects_folders_that_its_defaults_skip(tmp_path: Path) -> None:
    for folder in ("dist", "build", "venv"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text("def test_it(): pass\n")
    (tmp_path / "tests" / "test_empty.py").touch()
    assert uncollected(tmp_path) == {"tests/test_empty.py"}


def test_ruff_checks_every_python_file() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--show-files"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {str(Path(line).relative_to(ROOT)) for line in printed.split()} >= python_files(ROOT)


def test_workers_group_tests_by_file(request: pytest.FixtureRequest) -> None:
    """Without the group in their ids, the tests of a file would be spread over workers."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        assert request.node.nodeid.endswith("@tests/test_collection.py")
