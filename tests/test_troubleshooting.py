"""docs/troubleshooting.md quotes messages that the code prints."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def messages(root: Path) -> Iterator[str]:
    """All strings of the product; values in f-strings and `%` formats become `...`."""
    for folder in ("muomni", "data_prep"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%\.?\d*[a-z]", "...", node.value.replace("%%", "%"))


def quotes(page: str) -> list[str]:
    """Quoted messages in the first column of the table: those with a gap."""
    symptoms = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    return [q for text in symptoms for q in re.findall(r"`([^`]+)`", text) if "..." in q]


def unknown_quotes(page: str, root: Path) -> list[str]:
    patterns = {
        q: re.compile(".*".join(map(re.escape, q.split("..."))), re.S) for q in quotes(page)
    }
    known = list(messages(root))
    return [q for q, pattern in patterns.items() if not any(map(pattern.search, known))]


def test_quoted_messages_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert len(quotes(page)) > 10
    assert unknown_quotes(page, ROOT) == []


def test_unknown_message_is_found(tmp_path: Path) -> None:
    (tmp_path / "muomni").mkdir()
    source = 'print(f"run {name} is over; " f"start {other}")\nlog("kept %d of %s", 1, 2)\n'
    (tmp_path / "muomni/a.py").write_text(source)
    page = "| `run ... is over` | `x ... y` |\n| `kept ... of ...` |\n| `run ... ended` |\n"
    assert unknown_quotes(page, tmp_path) == ["run ... ended"]
