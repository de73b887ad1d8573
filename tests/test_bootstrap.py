"""Test scripts/bootstrap.sh and .ci/run on simulated machines.

A machine is a folder of small programs that is the entire PATH; nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "dirname", "cat", "head", "tail", "sha256sum", "awk", "flock", "mkdir", "rm")
TOOLS += ("touch", "chmod", "env")
# A fake interpreter: it answers the probes and creates an environment whose pip can fail.
FAKE_PYTHON = """\
#!/bin/bash
case "$*" in
    *version_info*) [ "$FAKE_VERSION" != old ] ;;
    *ensurepip*) [ "$FAKE_VENV" != missing ] ;;
    *Python.h*) [ "$FAKE_HEADERS" != missing ] ;;
    --version) echo Python 3.11.0 ;;
    "-m venv "*) mkdir -p .venv/bin && cat "$0" > .venv/bin/python && chmod +x .venv/bin/python ;;
    "-m pip "*) echo "pip ran" && [ "$FAKE_PIP" != fails ] ;;
    *build_shm_op*) echo "no such header" && [ "$FAKE_OP" != fails ] ;;
    *) exit 9 ;;
esac
"""


class Machine:
    """A clone with scripts/bootstrap.sh and a fake PATH."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.bin = folder / "clone", folder / "bin"
        for name in ("scripts/bootstrap.sh", "pyproject.toml", "requirements/lock.txt"):
            (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.clone / name)
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)
        self.add("python3", FAKE_PYTHON)
        self.add("c++", "#!/bin/bash\n")
        self.add("df", "#!/bin/bash\necho header\necho disk 1 1 ${FAKE_FREE_KB:-90000000} 1% /\n")

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def bootstrap(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.clone / "scripts/bootstrap.sh")],
            env={"PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("lack", "sentence"),
    [
        ({"FAKE_VERSION": "old"}, "no Python 3.10 or newer found; install one"),
        ({"FAKE_VENV": "missing"}, "python3 has no venv module; install it"),
        ({"FAKE_FREE_KB": "3000000"}, "has 3 GB of free disk space, but the installation needs"),
        ({"CXX": "no-such-compiler"}, "no working C++ compiler (no-such-compiler); install one"),
        ({"MUOMNI_PYTHON": "python2.7"}, "MUOMNI_PYTHON=python2.7 is not Python 3.10 or newer"),
        ({"MUOMNI_VENV": "/no/such/folder"}, "MUOMNI_VENV=/no/such/folder is not a virtual env"),
    ],
)
def test_missing_requirement_is_one_sentence(
    machine: Machine, lack: dict[str, str], sentence: str
) -> None:
    outcome = machine.bootstrap(**lack)
    assert outcome.returncode == 1
    assert sentence in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not (machine.clone / ".venv").exists()


def test_missing_python(machine: Machine) -> None:
    (machine.bin / "python3").unlink()
    outcome = machine.bootstrap()
    assert (outcome.returncode, len(outcome.stderr.splitlines())) == (1, 1)
    assert "apt-get install python3" in outcome.stderr


def test_second_call_does_nothing(machine: Machine) -> None:
    assert "done" in machine.bootstrap().stdout
    again = machine.bootstrap(FAKE_PIP="fails", FAKE_VERSION="old")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_missing_headers_only_cost_speed(machine: Machine) -> None:
    outcome = machine.bootstrap(FAKE_HEADERS="missing", FAKE_OP="fails")
    assert outcome.returncode == 0
    assert "apt-get install python3-dev" in outcome.stdout


@pytest.mark.parametrize(
    ("driver", "is_old"), [("550.54.15", True), ("580.65.06", False), ("no devices", False)]
)
def test_old_driver_is_named(machine: Machine, driver: str, is_old: bool) -> None:
    machine.add("nvidia-smi", f"#!/bin/bash\necho {driver}\n")
    outcome = machine.bootstrap()
    assert outcome.returncode == 0
    message = (
        "driver 550.54.15 is older than 580, so the locked torch (CUDA 13) cannot use the GPUs"
    )
    assert (message in outcome.stdout) is is_old


@pytest.mark.parametrize("trouble", ["FAKE_PIP", "FAKE_OP"])
def test_failed_installation_starts_over(machine: Machine, trouble: str) -> None:
    first = machine.bootstrap(**{trouble: "fails"})
    assert first.returncode == 1
    assert first.stderr.splitlines()[-1].startswith("bootstrap: ")
    partial = machine.clone / ".venv/bin/partial"
    partial.touch()
    assert machine.bootstrap().returncode == 0
    assert not partial.exists()


def test_uv_installs_if_available(machine: Machine) -> None:
    machine.add("uv", '#!/bin/bash\necho "uv $*" && [ "$FAKE_UV" != fails ]\n')
    outcome = machine.bootstrap(FAKE_UV="fails")
    assert (outcome.returncode, "pip ran" in outcome.stdout) == (1, False)
    outcome = machine.bootstrap()
    assert (
        "uv pip install --python .venv/bin/python --editable .[dev] --constraint" in outcome.stdout
    )
    assert outcome.returncode == 0


def test_pip_can_be_chosen_over_uv(machine: Machine) -> None:
    machine.add("uv", "#!/bin/bash\nexit 1\n")
    assert "pip ran" in machine.bootstrap(MUOMNI_INSTALLER="pip").stdout


def test_new_lock_is_installed_into_the_same_environment(machine: Machine) -> None:
    machine.bootstrap()
    kept = machine.clone / ".venv/kept"
    kept.touch()
    with (machine.clone / "requirements/lock.txt").open("a") as lock:
        lock.write("some-package==1.0\n")
    assert "pip ran" in machine.bootstrap().stdout
    assert kept.exists()
    assert machine.bootstrap().stdout == ""


def test_moved_clone_gets_a_new_environment(machine: Machine) -> None:
    machine.bootstrap()
    machine.clone = machine.clone.rename(machine.clone.with_name("moved"))
    assert "creating .venv" in machine.bootstrap().stdout


def test_foreign_folder_is_not_touched(machine: Machine) -> None:
    precious = machine.clone / ".venv/precious"
    precious.parent.mkdir()
    precious.touch()
    outcome = machine.bootstrap()
    assert outcome.returncode == 1
    assert "was not created by this script" in outcome.stderr
    assert precious.exists()


def test_existing_environment_is_used_as_is(machine: Machine) -> None:
    outcome = machine.bootstrap(MUOMNI_VENV=sys.prefix)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")
    assert not (machine.clone / ".venv").exists()


def test_existing_environment_without_packages_is_rejected(
    machine: Machine, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    outcome = machine.bootstrap(MUOMNI_VENV=str(bare))
    assert outcome.returncode == 1
    assert f"MUOMNI_VENV={bare} lacks torch, " in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.fixture
def ci_clone(tmp_path: Path) -> Path:
    """A clone whose `make lint test` fails, on a fake machine whose apt-get only logs its arguments."""
    for name in (".ci/run", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text(
        "lint:\n\t@echo linted; exit $${FAKE_LINT:-0}\n"
        "test:\n\t@echo '1 failed, 2 passed, 3 deselected in 4.56s (0:00:04)'; exit $${FAKE_TEST:-0}\n"
    )
    programs = {
        "apt-get": f'echo "$@" >> {tmp_path}/apt-get.log',
        "id": "echo 0",
        "python3": '[ "$FAKE_HEADERS" != missing ] || [[ "$*" != *Python.h* ]]',
    }
    (tmp_path / "bin").mkdir()
    for name, line in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run_ci(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # As a child of `make test`, make would also print the folders that it enters.
    outside_make = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["bash", ".ci/run"],
        cwd=clone,
        env={**outside_make, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("failure", "code"), [({}, 0), ({"FAKE_TEST": "1"}, 2), ({"FAKE_LINT": "1"}, 2)]
)
def test_ci_fails_with_lint_or_tests_and_ends_with_the_summary(
    ci_clone: Path, failure: dict[str, str], code: int
) -> None:
    outcome = run_ci(ci_clone, **failure)
    assert outcome.returncode == code  # make exits with 2 if a recipe fails
    first, *_, last = outcome.stdout.splitlines()
    assert first == "linted" and last.startswith("1 failed, 2 passed")
    assert not (ci_clone / "apt-get.log").exists()


def test_ci_installs_only_what_is_missing(ci_clone: Path) -> None:
    run_ci(ci_clone, FAKE_HEADERS="missing")
    update, install = (ci_clone / "apt-get.log").read_text().splitlines()
    assert update.startswith("update")
    assert install.split()[-1] == "python3-dev"
    assert not {"make", "g++", "python3-venv"} & set(install.split())
