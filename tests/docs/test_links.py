"""Links, anchors, file paths, and config keys in Markdown pages exist, and reference pages are short."""

import re
from pathlib import Path

import pytest

from scripts.config_table import all_keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# The changelog names old files and keys.
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
MAX_WORDS = 1_000
MAX_TUTORIAL_WORDS = 500
# The log grows; the glossary has an entry per term.
LONG_PAGES = ("LOG.md", "glossary.md")
# Tables that scripts write do not count.
GENERATED = r"<!-- \w+: ?begin.*?<!-- \w+: ?end -->"
SOURCE_FOLDERS = (
    "muomni|data_prep|launch|slurm|scripts|benchmarks|tests|configs|docs|samples|requirements"
)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The text of a page without code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^( {4}|\t)(?!- ).*$", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as on GitHub."""
    titles = re.findall(r"^#{1,6} +(.+?) *$", without_code(text), re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or anchor does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        has_anchor = not anchor or (
            target.exists() and anchor in anchors(target.read_text(encoding="utf-8"))
        )
        if not target.exists() or not has_anchor:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_anchors_exist(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=page_id)
def test_source_files_exist(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    names = re.findall(rf"`((?:{SOURCE_FOLDERS})/[\w./-]*)`", text)
    assert [
        name
        for name in names
        if not re.search(r"[A-Z]{3}|zeroN", name) and not (ROOT / name).exists()
    ] == []


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=page_id)
def test_config_keys_exist(page: Path) -> None:
    keys = all_keys()
    sections = "|".join({key.partition(".")[0] for key in keys})
    text = page.read_text(encoding="utf-8")
    # Keys in code, with or without a value.
    named = re.findall(
        rf"(?<![\w./*-])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?=[`=: ])(?!\.)", text
    )
    # A mapping takes any key.
    unknown = {key for key in named if key not in keys and not key.endswith((".py", ".md"))}
    assert unknown == set()


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=page_id)
def test_reference_pages_are_short(page: Path) -> None:
    text = re.sub(GENERATED, "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    if page.name not in LONG_PAGES:
        is_tutorial = page.parent.name == "tutorials"
        assert len(text.split()) <= (MAX_TUTORIAL_WORDS if is_tutorial else MAX_WORDS)


def test_every_variable_is_documented() -> None:
    sources = [ROOT / "Makefile"]
    for folder in ("muomni", "data_prep", "slurm", "scripts"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sources)
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"MUOMNI_[A-Z_]+", text)) <= set(re.findall(r"MUOMNI_[A-Z_]+", page))


def test_glossary_entries_have_a_comparison_and_a_page() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert len(terms) >= 60 and list(terms) == sorted(terms, key=str.lower)
    assert [
        t for t, entry in terms.items() if not re.search(r"\*.+?\*\s\[.+\]\(", entry, re.DOTALL)
    ] == []


def test_every_page_is_linked_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
        targets = {(page.parent / link).resolve() for link in links if ":" not in link}
        waiting += sorted(targets - reached)
    assert set(PAGES) <= reached


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Title: `a_b` c\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#title-a_b-c) [b](other.md#title) [c](none.md) [d](#here) [e](https://x.y/z)\n"
        "\n    [code](none.md)\n\n## Here\n"
    )
    assert broken_links(page) == ["other.md#title", "none.md"]
