"""Write requirements/lock.txt: the exact versions that `make install` uses, for several Pythons.

    python scripts/write_lock.py python3.10 python3.11 python3.12    (or `make lock`)

Asks the pip (>= 23.1) of each interpreter to resolve pyproject.toml without installing, and merges the
answers; where an older Python needs an older version, the line gets a marker. `PINNED` are the
versions that belong together and were tested; the rest follows from them. Run the whole test
suite with the new lock before committing it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
# torchaudio declares no dependency on torch, so pip cannot know which ones fit together.
PINNED = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0", "deepspeed==0.19.8")
HEADER = """\
# Exact versions of everything that `make install` installs; pip reads it as a constraints file.
# Written by scripts/write_lock.py for Python {versions}; change pyproject.toml, not this file.
"""
Version = tuple[int, int]


def resolve(python: str) -> tuple[Version, dict[str, str]]:
    """Return the version of interpreter `python` and the package versions that its pip chooses."""
    probe = "import sys; print(*sys.version_info[:2])"
    answer = subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True)
    major, minor = map(int, answer.stdout.split())
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "pinned.txt", Path(folder) / "report.json"
        constraints.write_text("\n".join(PINNED) + "\n")
        command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "--constraint", str(constraints), f"{ROOT}[dev]"]
        subprocess.run(command, check=True)
        installs = json.loads(report.read_text())["install"]
    packages = [install["metadata"] for install in installs]
    return (major, minor), {
        package["name"].lower().replace("_", "-"): package["version"]
        for package in packages
        if package["name"] != "muomni"
    }


def merge(answers: dict[Version, dict[str, str]]) -> list[str]:
    """Return the lock's lines: one a package, or one with a marker for each run of equal versions."""
    pythons = sorted(answers)
    lines = []
    for name in sorted(set().union(*answers.values())):
        chosen = [(python, answers[python][name]) for python in pythons if name in answers[python]]
        runs: list[tuple[Version, str]] = []  # first Python of the run, package version
        for python, version in chosen:
            if not runs or runs[-1][1] != version:
                runs.append((python, version))
        for index, (first, version) in enumerate(runs):
            bounds = []
            if index > 0:
                bounds.append(f'python_version >= "{first[0]}.{first[1]}"')
            if index + 1 < len(runs):
                after = runs[index + 1][0]
                bounds.append(f'python_version < "{after[0]}.{after[1]}"')
            marker = f" ; {' and '.join(bounds)}" if bounds else ""
            lines.append(f"{name}=={version}{marker}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Write requirements/lock.txt.")
    parser.add_argument("python", nargs="*", default=[sys.executable])
    answers = dict(resolve(python) for python in parser.parse_args().python)
    versions = ", ".join(f"{major}.{minor}" for major, minor in sorted(answers))
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.write_text(HEADER.format(versions=versions) + "\n".join(merge(answers)) + "\n")
    print(f"wrote {LOCK.relative_to(ROOT)} for Python {versions}")


if __name__ == "__main__":
    main()
