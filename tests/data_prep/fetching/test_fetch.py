"""Downloads from a server that fails: results by row, files, limits, and the tables that the readers take."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from data_prep.cli.main import main
from data_prep.fetching import download
from data_prep.fetching.fetch import fetch
from data_prep.fetching.journal import Summary
from data_prep.fetching.url_table import UrlTable
from data_prep.options import FetchOptions, MediaKind
from muomni.data.shards.manifest import Manifest
from muomni.errors import DataError
from muomni.io.count_progress import open_progress
from tests.data_prep.commands import Capture, fails
from tests.data_prep.fetching.bad_server import BadServer, bad_server
from tests.data_prep.raw_corpora import audio, image

WHOLE = ("--val-fraction", "0", "--test-fraction", "0")
FAST = FetchOptions(
    allow_private=True,
    host_rate=1000,
    num_per_host=16,
    num_attempts=2,
    first_wait_s=0.01,
    read_timeout_s=0.3,
    total_timeout_s=0.6,
    max_bytes=10**6,
)


@pytest.fixture
def server() -> Iterator[BadServer]:
    with bad_server() as running:
        yield running


def write_table(path: Path, urls: list[str], text: str = "caption") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["url", text])
        rows.writerows([url, f"words of row {number}"] for number, url in enumerate(urls, start=1))
    return path


def download_all(
    urls: list[str], folder: Path, options: FetchOptions = FAST, kind: MediaKind = "image"
) -> tuple[Summary, list[dict]]:
    """Fetch a table of URLs; returns the summary and the results by row."""
    text = "caption" if kind == "image" else "text"
    src = write_table(folder.parent / "urls.csv", urls, text)
    table = UrlTable(src, "csv", {}, kind)
    summary = fetch(table, folder, options, "temporary", open_progress)
    return summary, lines_of(folder / "results.jsonl")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def changed(**values: object) -> FetchOptions:
    return replace(FAST, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "reason", "status", "is_temporary", "num_hits"),
    [
        ("/status/404", "http-404", 404, False, 1),
        ("/status/403", "http-403", 403, False, 1),
        ("/status/206", "http-206", 206, False, 1),
        ("/status/500", "http-500", 500, True, 2),
        ("/status/503", "http-503", 503, True, 2),
        ("/html", "not-image", 200, False, 1),
        ("/tiff", "not-image", 200, False, 1),
        ("/empty", "empty", 200, False, 1),
        ("/tag/noai", "robots-tag", 200, False, 1),
        ("/tag/nofollow, NoImageIndex", "robots-tag", 200, False, 1),
        ("/tag/muomni: noindex", "robots-tag", 200, False, 1),
        ("/loop", "redirects", None, False, 6),
        ("/away/ftp://example.org/x.png", "bad-url", 301, False, 1),
        ("/away/file:///etc/passwd", "bad-url", 301, False, 1),
        ("/away/", "bad-url", 301, False, 1),
        ("/hang", "timeout", None, True, 2),
        ("/stall", "timeout", None, True, 2),
        ("/drip", "timeout", None, True, 2),
        ("/truncated", "truncated", None, True, 2),
        ("/cut_chunks", "truncated", None, True, 2),
        ("/endless", "too-large", 200, False, 1),
        ("/claims", "too-large", 200, False, 1),
        ("/bomb", "too-large", 200, False, 1),
        ("/closed", "connection", None, True, 2),
        ("/garbage", "bad-response", None, True, 2),
    ],
)
def test_failures(
    server: BadServer,
    tmp_path: Path,
    path: str,
    reason: str,
    status: int | None,
    is_temporary: bool,
    num_hits: int,
) -> None:
    summary, (result,) = download_all([server.url(path)], tmp_path / "out")
    assert (result["ok"], result["reason"], result["http_status"]) == (False, reason, status)
    assert result["temporary"] is is_temporary and result["message"]
    # aiohttp repeats a request if a connection that it used before was closed.
    assert server.hits[path] in ((2, 4) if path == "/closed" else (num_hits,))
    assert dict(summary.reasons) == {reason: 1} and summary.num_ok == 0
    files = [each for each in (tmp_path / "out").rglob("*") if each.is_file()]
    assert {each.name for each in files} == {
        *("journal.jsonl", "results.jsonl", "source.json", "table.jsonl")
    }
    assert (tmp_path / "out" / "table.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("path", "number", "final"),
    [
        ("/ok/1", 1, "/ok/1"),
        ("/type", 3, "/type"),
        ("/twice/500", 1, "/twice/500"),
        ("/twice/429", 1, "/twice/429"),
        ("/to/to/ok/4", 4, "/ok/4"),
        ("/tag/otherbot: noindex", 4, "/tag/otherbot:%20noindex"),
        ("/größe 1/6", 6, "/gr%C3%B6%C3%9Fe%201/6"),
        ("/ok/7?a=%2F&b=c%20d#part", 7, "/ok/7?a=%2F&b=c%20d"),
    ],
)
def test_successes(server: BadServer, tmp_path: Path, path: str, number: int, final: str) -> None:
    _, (result,) = download_all([server.url(path)], tmp_path / "out")
    stored = tmp_path / "out" / result["path"]
    assert stored.read_bytes() == image(number) and stored.suffix == ".png"
    assert result["sha256"] == hashlib.sha256(image(number)).hexdigest()
    assert result["bytes"] == len(image(number)) and result["http_status"] == 200
    assert result["final_url"] == server.url(final)
    assert lines_of(tmp_path / "out" / "table.jsonl") == [
        {"image": result["path"], "caption": "words of row 1", "url": server.url(path)}
    ]


def test_retry_after_is_waited_for_and_limited(server: BadServer, tmp_path: Path) -> None:
    download_all([server.url("/later/1")], tmp_path / "out")
    first, second = server.times["/later/1"]
    assert second - first >= 1
    _, results = download_all(
        [server.url("/later/3600"), *(server.url(f"/ok/{n}") for n in range(20))],
        tmp_path / "long",
        changed(num_per_host=1),
    )
    assert server.hits["/later/3600"] == 1 and sum(server.hits.values()) < 10
    assert results[0]["temporary"] and results[-1]["reason"] == "http-429"


def test_equal_urls_are_requested_once(server: BadServer, tmp_path: Path) -> None:
    urls = [server.url("/ok/1"), server.url("/ok/2"), f" {server.url('/ok/1')} "]
    summary, results = download_all(urls, tmp_path / "out")
    assert server.hits["/ok/1"] == 1
    assert [result["row"] for result in results] == [1, 2, 3]
    assert results[0]["path"] == results[2]["path"]
    assert (summary.num_ok, summary.num_files) == (3, 2)


def test_bad_rows_cost_one_row(server: BadServer, tmp_path: Path) -> None:
    urls = ["", "ftp://example.org/x", "no url", "http://", "http://a..b/", server.url("/ok/1")]
    summary, results = download_all(urls, tmp_path / "out")
    assert summary.num_ok == 1
    assert {result["reason"] for result in results[:-1]} == {"bad-url"}
    assert "names no host" in results[3]["message"]


def test_private_addresses_are_refused(
    server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.server_address[1]
    hosts = (
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "0x7f.1",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
    )
    urls = [f"http://{host}:{port}/ok/1" for host in hosts]
    _, results = download_all(urls, tmp_path / "out", changed(allow_private=False))
    assert sum(server.hits.values()) == 0
    reasons = {result["url"].split("/")[2]: result["reason"] for result in results}
    assert reasons.pop(f"2130706433:{port}") in ("bad-url", "private-address")
    assert set(reasons.values()) <= {"private-address", "connection"}, reasons
    assert "--allow-private" in results[0]["message"]

    # A name that resolves to another address when it is connected.
    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list[dict]:
        return [
            {
                "hostname": host,
                "host": "127.0.0.1",
                "port": port,
                "family": 2,
                "proto": 0,
                "flags": 0,
            }
        ]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    urls = [f"http://images.example.org:{port}/ok/1"]
    _, (result,) = download_all(urls, tmp_path / "name", changed(allow_private=False))
    assert result["reason"] == "private-address" and sum(server.hits.values()) == 0


def test_redirects_to_private_addresses_are_refused(
    server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    target = server.url("/ok/1").replace("127.0.0.1", "127.0.0.2")
    _, results = download_all(
        [server.url(f"/away/{target}"), server.url("/to/ok/2")],
        tmp_path / "out",
        changed(allow_private=False),
    )
    assert [result["reason"] for result in results] == ["private-address", ""]
    assert results[0]["final_url"] == target and server.hits["/ok/1"] == 0


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        *((each, False) for each in ("10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1")),
        *((each, False) for each in ("127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1")),
        *((each, False) for each in ("::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1")),
        *((each, False) for each in ("64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1", "::")),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert download.is_public(address) is expected


def test_dead_hosts_are_given_up(tmp_path: Path) -> None:
    urls = [f"http://127.0.0.1:1/{number}" for number in range(200)]
    summary, results = download_all(urls, tmp_path / "out", changed(num_attempts=3))
    assert dict(summary.reasons) == {"connection": 200} and summary.num_temporary == 200
    assert "given up" in results[-1]["message"]


def test_robots_txt(server: BadServer, tmp_path: Path) -> None:
    server.robots = (200, "User-agent: *\nDisallow: /ok/2\nDisallow: /*/3$\n")
    paths = ["/ok/1", "/ok/2", "/ok/3", "/ok/33", "/to/ok/2"]
    urls = [server.url(path) for path in paths]
    _, results = download_all(urls, tmp_path / "out")
    assert [result["reason"] for result in results] == ["", "robots", "robots", "", "robots"]
    assert server.hits["/robots.txt"] == 1 and server.hits["/ok/2"] == 0
    _, results = download_all(urls, tmp_path / "all", changed(robots="tags"))
    assert all(result["ok"] for result in results) and server.hits["/robots.txt"] == 1
    _, (result,) = download_all(
        [server.url("/tag/noai")], tmp_path / "none", changed(robots="none")
    )
    assert result["ok"]


@pytest.mark.parametrize(
    ("status", "is_ok"), [(404, True), (403, True), (503, False), (429, False)]
)
def test_robots_txt_that_cannot_be_read(
    server: BadServer, tmp_path: Path, status: int, is_ok: bool
) -> None:
    server.robots = (status, "User-agent: *\nDisallow: /\n")
    _, (result,) = download_all([server.url("/ok/1")], tmp_path / "out")
    assert result["ok"] is is_ok and result["temporary"] is not is_ok


def test_robots_txt_is_read_again_after_a_failure(server: BadServer, tmp_path: Path) -> None:
    server.num_robots_failures = 1
    _, (result,) = download_all([server.url("/ok/1")], tmp_path / "out")
    assert result["ok"] and server.hits["/robots.txt"] == 2


def test_limits_per_host(server: BadServer, tmp_path: Path) -> None:
    server.delay_s = 0.05
    urls = [server.url(f"/ok/{number}") for number in range(12)]
    download_all(urls, tmp_path / "out", changed(num_per_host=3))
    assert server.max_open == 3
    server.delay_s = 0.0
    urls = [server.url(f"/ok/{number}") for number in range(100, 106)]
    download_all(urls, tmp_path / "slow", changed(host_rate=20, robots="none"))
    times = sorted(server.times[f"/ok/{number}"][0] for number in range(100, 106))
    assert times[-1] - times[0] >= 5 / 20 * 0.9


def test_user_agent(server: BadServer, tmp_path: Path) -> None:
    download_all([server.url("/ok/1")], tmp_path / "out", changed(contact="me@example.org"))
    (agent,) = server.agents
    assert agent.startswith("muomni/") and "+me@example.org" in agent


def test_images_and_audio_become_datasets(
    server: BadServer, tmp_path: Path, capsys: Capture
) -> None:
    columns = ["--columns", "url=link"]
    options = ["--allow-private", "--host-rate", "1000"]
    src = tmp_path / "links.jsonl"
    rows = [
        {"link": server.url(f"/ok/{number}"), "caption": f"thing {number}", "width": 24}
        for number in range(5)
    ]
    src.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "images"
    main(["fetch", "--format", "jsonl", "--src", str(src), *columns, "--out", str(out), *options])
    printed = capsys.readouterr().out
    assert "5 of 5 rows have a file (5 files" in printed
    command = printed[printed.index("-m data_prep ") :].split()[2:]
    assert command[-1] == "DATASET"
    main([*command[:-1], str(tmp_path / "shards"), "--workers", "1", *WHOLE])
    totals = Manifest.load(tmp_path / "shards").split("train").totals
    assert totals.num_samples == 5 and totals.num_images == 5
    assert lines_of(out / "table.jsonl")[0]["width"] == 24

    src = write_table(tmp_path / "clips.csv", [server.url(f"/audio/{n}") for n in range(3)], "text")
    out = tmp_path / "audio"
    arguments = ["fetch", "--format", "csv", "--src", str(src), "--kind", "audio", *options]
    main([*arguments, "--out", str(out)])
    first = lines_of(out / "table.jsonl")[0]
    assert (out / first["audio"]).read_bytes() == audio(0)
    printed = capsys.readouterr().out
    command = printed[printed.index("-m data_prep ") :].split()[2:]
    main([*command[:-1], str(tmp_path / "speech"), "--workers", "1", *WHOLE])
    assert Manifest.load(tmp_path / "speech").split("train").num_samples == 3


def test_too_many_failures_are_an_error(server: BadServer, tmp_path: Path, capsys: Capture) -> None:
    paths = ["/ok/1", "/ok/2", "/status/404"]
    src = write_table(tmp_path / "urls.csv", [server.url(path) for path in paths])
    arguments = ["fetch", "--format", "csv", "--src", str(src), "--allow-private"]
    arguments += ["--out", str(tmp_path / "out"), "--host-rate", "1000"]
    main([*arguments, "--max-bad-fraction", "0.34"])
    assert "http-404     1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--max-bad-fraction", "0.3"])
    assert stop.value.code == 3
    assert "1 of 3 rows have no file" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "out" / "table.jsonl")) == 2


def test_dry_run_requests_nothing(server: BadServer, tmp_path: Path, capsys: Capture) -> None:
    urls = [server.url("/ok/1"), server.url("/ok/2"), server.url("/ok/1"), "gopher://x"]
    src = write_table(tmp_path / "urls.csv", urls)
    arguments = ["fetch", "--format", "csv", "--src", str(src), "--out", str(tmp_path / "out")]
    main([*arguments, "--dry-run"])
    printed = capsys.readouterr().out
    assert "4 rows, 1 with the URL of an earlier row" in printed
    assert "1 rows that cannot be fetched: bad-url 1" in printed
    assert "2 URLs to fetch, 0 already stored" in printed
    assert not server.hits and not (tmp_path / "out").exists()


def test_errors_of_the_command_line(server: BadServer, tmp_path: Path, capsys: Capture) -> None:
    src = write_table(tmp_path / "urls.csv", [server.url("/ok/1")])
    arguments = ["fetch", "--format", "csv", "--src", str(src), "--out", str(tmp_path / "out")]
    assert "did you mean url=link?" in fails(capsys, *arguments, "--columns", "image=link", code=2)
    assert "'a b'" in fails(capsys, *arguments, "--contact", "a b", code=2)
    assert "no column 'url'" in fails(capsys, *arguments, "--columns", "url=link")
    empty = write_table(tmp_path / "empty.csv", [])
    arguments[4] = str(empty)
    assert "has no rows" in fails(capsys, *arguments)


def test_path_column_is_not_replaced(tmp_path: Path) -> None:
    src = tmp_path / "rows.jsonl"
    src.write_text('{"url": "http://a/b", "image": "old.png"}\n')
    with pytest.raises(DataError, match="rename it with --columns NAME=image"):
        list(UrlTable(src, "jsonl", {}, "image").rows())
    (row,) = UrlTable(src, "jsonl", {"old": "image"}, "image").rows()
    assert row.values == {"old": "old.png"}
