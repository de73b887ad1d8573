"""The documentation site has all pages, valid links, and nothing from other hosts."""

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from scripts.docs_site import site_link

ROOT = Path(__file__).resolve().parents[2]
# What a browser loads by itself: scripts, styles, fonts, and images, but not links of the text.
LOADED = (
    r"""<(?:script|img|source)[^>]*?\ssrc=["']?https?:|<link[^>]*?\shref=["']?https?:"""
    r"""|url\(["']?https?:|@import"""
)


def test_site_is_complete_and_offline(tmp_path: Path) -> None:
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build(config)  # a page without an entry in the navigation, or a wrong link, is an error
    assert {"index.html", "contributing.html", "changelog.html", "tutorials/sft.html"} <= {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")
    }
    assert (tmp_path / "search" / "search_index.json").stat().st_size > 100_000
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".css")]
    assert [path.name for path in files if re.search(LOADED, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("link", "source", "uri", "expected"),
    [
        ("docs/data.md", "CONTRIBUTING.md", "contributing.md", "data.md"),
        ("CHANGELOG.md", "CONTRIBUTING.md", "contributing.md", "changelog.md"),
        ("../CONTRIBUTING.md", "docs/index.md", "index.md", "contributing.md"),
        ("../README.md", "docs/faq.md", "faq.md", "index.md"),
        ("../../CHANGELOG.md", "docs/tutorials/sft.md", "tutorials/sft.md", "../changelog.md"),
        ("../sft.md", "docs/tutorials/sft.md", "tutorials/sft.md", "../sft.md"),
        ("codec.md", "docs/tutorials/sft.md", "tutorials/sft.md", "codec.md"),
        ("images/flow.svg", "docs/index.md", "index.md", "images/flow.svg"),
    ],
)
def test_links_lead_to_pages_of_the_site(link: str, source: str, uri: str, expected: str) -> None:
    assert site_link(link, source, uri) == expected
