"""Refuse words that terms.txt replaces by the field's standard terms: `python scripts/check_terms.py`.

Checks the text files that git tracks. Spaces of a term also match line breaks, `_`, and `-`, so identifiers are
checked, too. A line that contains `terms: allow` is skipped.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TERMS = Path(__file__).with_name("terms.txt")
FILES = ("*.py", "*.md", "*.yaml", "*.toml", "*.sh", "*.sbatch", "Makefile", ".ci/run")
# Data, and files that quote old names.
EXCLUDED = ("samples/", "CHANGELOG.md", "docs/LOG.md", "tests/scripts/test_check_terms.py")
ALLOW = "terms: allow"


def read_terms(text: str) -> list[tuple[re.Pattern[str], str]]:
    """Parse lines `regular expression -> replacement`; `#` starts a comment."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.split(" -> ") for line in lines if line)
    return [
        (re.compile(rf"(?<![a-z])(?:{term})(?![a-z])".replace(" ", r"[\s_#-]+"), re.I), replacement)
        for term, replacement in pairs
    ]


def find_terms(name: str, text: str, terms: list[tuple[re.Pattern[str], str]]) -> list[str]:
    """Return one line `name:number: word -> replacement` per match in `text`."""
    lines = text.splitlines()
    found = []
    for pattern, replacement in terms:
        for match in pattern.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            if ALLOW not in lines[number - 1]:
                found.append((number, " ".join(match.group().split()), replacement))
    return [
        f"{name}:{number}: {word} -> {replacement}" for number, word, replacement in sorted(found)
    ]


def main() -> None:
    terms = read_terms(TERMS.read_text(encoding="utf-8"))
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FILES]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.splitlines() if not name.startswith(EXCLUDED)]
    found = [
        line
        for name in names
        if (ROOT / name).is_file()
        for line in find_terms(name, (ROOT / name).read_text(encoding="utf-8"), terms)
    ]
    print("\n".join(found) if found else f"{len(names)} files contain none of {len(terms)} terms")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
