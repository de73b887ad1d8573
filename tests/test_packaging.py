"""The built distribution works outside the repository, and declares what it needs."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("muomni", "data_prep", "configs", "pyproject.toml", "README.md", "LICENSE")
# Each extra, with a module that it installs.
EXTRAS = {
    "s3": "s3fs", "gcs": "gcsfs", "hf": "huggingface_hub", "tensorboard": "tensorboard",
    "docs": "material", "demo": "gradio", "dev": "pytest", "judge": "pocketsphinx",
}  # fmt: skip
# Commands of an installed package, run outside the repository.
COMMANDS = (
    ("muomni", "--version"),
    ("muomni", "count", "nano"),
    ("muomni", "train", "--help"),
    ("muomni", "data", "--help"),
    ("python", "-m", "data_prep", "--help"),
)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the repository on the path; returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    return outcome.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from an sdist of a clean copy of the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=caches)
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which borrows the dependencies of the running one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install")
    run(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=folder.parent)
    return folder


def test_wheel_holds_packages_and_their_data_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    packages = {name.partition("/")[0] for name in files if ".dist-info/" not in name}
    assert packages == {"muomni", "data_prep"}
    for folder in ("presets", "recipes", "deepspeed"):
        source = ROOT / "muomni" / "config" / folder
        expected = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
        prefix = f"muomni/config/{folder}/"
        found = {Path(name).name: files[name] for name in files if name.startswith(prefix)}
        assert expected and found == expected


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_runs_outside_the_repository(
    environment: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    program, *arguments = command
    assert run(environment / "bin" / program, *arguments, cwd=tmp_path)


def test_presets_resolve_outside_the_repository(environment: Path, tmp_path: Path) -> None:
    code = "from muomni.config import loading; print(loading.__file__, loading.preset_names());"
    code += "loading.resolve('thinker', 'nano')"
    file, _, presets = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).partition(" ")
    assert Path(file).is_relative_to(environment) and "nano" in presets


def test_extras_have_their_names(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)


@pytest.mark.parametrize(
    ("url", "extra"), [("s3://bucket/a", "s3"), ("gs://bucket/a", "gcs"), ("hf://datasets/a", "hf")]
)
def test_missing_extra_is_reported(url: str, extra: str) -> None:
    code = f"""if True:
        import sys
        sys.modules["{EXTRAS[extra]}"] = None  # as if it were not installed
        from muomni.errors import MachineError
        from muomni.io.remote_folder import RemoteFolder
        try:
            RemoteFolder("{url}").folders()
        except MachineError as error:
            print(error)
    """
    assert f"pip install 'muomni[{extra}]'" in run(sys.executable, "-c", code, cwd=ROOT)


def imported_modules(folder: Path) -> set[str]:
    """Top-level names of all absolute imports below `folder`."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def test_every_import_is_declared(metadata: Message) -> None:
    requirements = map(Requirement, metadata.get_all("Requires-Dist", []))
    declared = {
        canonicalize_name(requirement.name)
        for requirement in requirements
        if "dev" not in str(requirement.marker)
    }
    imported = imported_modules(ROOT / "muomni") | imported_modules(ROOT / "data_prep")
    imported -= {*sys.stdlib_module_names, "muomni", "data_prep"}
    distributions = packages_distributions()
    undeclared = {
        module
        for module in imported
        if declared.isdisjoint(map(canonicalize_name, distributions.get(module, [module])))
    }
    assert undeclared == set()
