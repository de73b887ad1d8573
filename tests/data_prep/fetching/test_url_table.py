"""Rows of URL tables in each format, and what counts as a URL."""

import datetime
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.fetching.fetch import survey
from data_prep.fetching.journal import json_line
from data_prep.fetching.url_table import UrlTable, parse_url
from muomni.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://a.org/b c", "http://a.org/b%20c"),
        ("HTTPS://a.org", "https://a.org/"),
        ("http://a.org/b%2Fc?sig=x%2By&u=~", "http://a.org/b%2Fc?sig=x%2By&u=~"),
        ("http://bücher.example/größe", "http://xn--bcher-kva.example/gr%C3%B6%C3%9Fe"),
        ("http://a.org/x#top", "http://a.org/x"),
    ],
)
def test_urls(text: str, expected: str) -> None:
    assert str(parse_url(text)).rstrip("/") == expected.rstrip("/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no URL"),
        ("image.png", "not an HTTP or HTTPS URL"),
        ("data:image/png;base64,AAAA", "not an HTTP or HTTPS URL"),
        ("http:///x", "names no host"),
        ("http://a:99999/", "not a URL"),
        ("http://" + "a" * 64 + ".org/", "not a URL"),
        ("http://a/" + "b" * 9000, "more than 8192 characters"),
        ("http://a/\udcff", "not a URL"),
    ],
)
def test_bad_urls(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_url(text)


def test_columns_are_renamed_and_kept(tmp_path: Path) -> None:
    src = tmp_path / "rows.tsv"
    src.write_text('URL\tTEXT\tcaption\tid\nhttp://a/1\tsays "hi\told\t0\n')
    (row,) = UrlTable(src, "tsv", {"url": "URL", "caption": "TEXT"}, "image").rows()
    assert (row.number, row.url) == (1, "http://a/1")
    assert row.values == {"caption": 'says "hi', "id": "0"}


def test_bad_rows(tmp_path: Path) -> None:
    src = tmp_path / "rows.jsonl"
    lines = ['{"url": "http://a/1"}', "{]", '{"url": null}', '{"url": ["http://a"]}']
    src.write_text("\n".join(lines))
    rows = list(UrlTable(src, "jsonl", {}, "image").rows())
    problems = [row.problem.message if row.problem else "" for row in rows]
    assert problems[0] == "" and "JSON" in problems[1] and "no URL" in problems[2]
    assert "'url' is a list" in problems[3]


def test_parquet_folder_without_bytes(tmp_path: Path) -> None:
    for number in range(2):
        table = pyarrow.table(
            {
                "url": [f"http://a/{number}"],
                "caption": [["one", "two"]],
                "score": [float("nan")],
                "day": [datetime.date(2026, 1, 2)],
                "hash": [b"\x00"],
                "file": [{"bytes": b"\x00", "path": "x"}],
            }
        )
        pyarrow.parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    rows = list(UrlTable(tmp_path, "parquet", {}, "image").rows())
    assert [(row.number, row.url) for row in rows] == [(1, "http://a/0"), (2, "http://a/1")]
    assert json.loads(json_line(rows[0].values)) == {
        "caption": ["one", "two"],
        "score": None,
        "day": "2026-01-02",
    }
    with pytest.raises(DataError, match="no column 'url'"):
        list(UrlTable(tmp_path, "parquet", {"url": "link"}, "image").rows())


@pytest.mark.parametrize("value", [b"\xff", [float("nan")], {"a": {1, 2}}, float("inf")])
def test_a_value_that_json_does_not_have_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"cannot hold 'thumb': .*remove this column"):
        json_line({"caption": "a cat", "thumb": value})


def test_a_table_whose_results_cannot_be_written_is_refused_before_downloads(
    tmp_path: Path,
) -> None:
    src = tmp_path / "urls.jsonl"
    src.write_text('{"url": "http://a.example/1", "scores": [NaN]}\n')
    table = UrlTable(src, "jsonl", {}, "image")
    with pytest.raises(DataError, match="cannot hold 'scores'"):
        survey(table, None, "temporary")
