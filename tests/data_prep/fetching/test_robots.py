"""robots.txt as in RFC 9309, and X-Robots-Tag."""

import pytest

from data_prep.fetching.robots import parse_robots, refusing_tag


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("", "/a", True),
        ("User-agent: *\nDisallow: /", "/a", False),
        ("User-agent: *\nDisallow:", "/a", True),
        ("\ufeffuser-AGENT : *\r\nDISALLOW : /a # no\r\n", "/ab", False),
        ("User-agent: other\nDisallow: /", "/a", True),
        # The group of the tool replaces that of all; several groups of one agent are one.
        ("User-agent: *\nDisallow: /\n\nUser-agent: Muomni\nDisallow: /b", "/a", True),
        ("User-agent: muomni\nDisallow: /a\n\nUser-agent: muomni\nDisallow: /b", "/b", False),
        ("User-agent: other\nUser-agent: muomni\nDisallow: /a", "/a", False),
        ("User-agent: other\nDisallow: /\nUser-agent: *\nDisallow: /b", "/a", True),
        # The longest match decides, and Allow among equals.
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/c", True),
        ("User-agent: *\nAllow: /a\nDisallow: /a/b", "/a/b/c", False),
        ("User-agent: *\nDisallow: /a\nAllow: /a", "/a", True),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg", False),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg?w=1", True),
        ("User-agent: *\nDisallow: /*/private*/", "/x/private-1/y", False),
        ("User-agent: *\nDisallow: /a*b*b$", "/ab", True),
        ("User-agent: *\nDisallow: /a$", "/ab", True),
        ("User-agent: *\nDisallow: *", "/a", False),
        ("User-agent: *\nDisallow: /caf%C3%A9", "/café", False),
        ("User-agent: *\nDisallow: /café", "/caf%C3%A9", False),
        ("Disallow: /\nno colon\nSitemap: x", "/a", True),
    ],
)
def test_rules(text: str, path: str, expected: bool) -> None:
    assert parse_robots(text).allows(path) is expected


def test_crawl_delay() -> None:
    text = "User-agent: *\nCrawl-delay: 2.5\nDisallow: /a\nUser-agent: other\nCrawl-delay: 9"
    assert parse_robots(text).crawl_delay_s == 2.5
    assert parse_robots("User-agent: *\nCrawl-delay: soon").crawl_delay_s == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        (["all"], ""),
        (["nofollow, NoAI"], "noai"),
        (["nofollow", "noindex"], "noindex"),
        (["otherbot: noindex, noai"], ""),
        (["otherbot: noindex, muomni: noai"], "noai"),
        (["max-snippet: 5, noindex"], "noindex"),
        (["Muomni: noimageai"], "noimageai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST"], ""),
    ],
)
def test_tags(values: list[str], expected: str) -> None:
    assert refusing_tag(values) == expected
