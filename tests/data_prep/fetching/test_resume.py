"""Runs that continue: after a kill, after failures, with a longer table, and with missing files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.fetching.fetch import Retry, fetch
from data_prep.fetching.journal import Summary
from data_prep.fetching.url_table import UrlTable
from muomni.errors import DataError
from muomni.io.count_progress import open_progress
from tests.data_prep.commands import Capture
from tests.data_prep.fetching.bad_server import bad_server
from tests.data_prep.fetching.test_fetch import FAST, lines_of, write_table

ROOT = Path(__file__).resolve().parents[3]


def run(src: Path, out: Path, retry: Retry = "temporary") -> Summary:
    return fetch(UrlTable(src, "csv", {}, "image"), out, FAST, retry, open_progress)


def test_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bad_server() as server:
        server.delay_s = 0.02
        src = write_table(tmp_path / "u.csv", [server.url(f"/ok/{n}") for n in range(60)])
        command = [
            *(sys.executable, "-m", "data_prep", "fetch", "--format", "csv", "--src", str(src)),
            *("--out", str(out), "--allow-private", "--host-rate", "1000", "--per-host", "3"),
        ]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 60
        while sum(server.hits.values()) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = {json.loads(line)["url"] for line in (out / "journal.jsonl").open()}
        assert 0 < len(done) < 60
        for path in out.glob("images/*/[!.]*"):  # no partial file under its final name
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        before = dict(server.hits)
        assert run(src, out).num_ok == 60
        again = [path for path, number in server.hits.items() if before.get(path, 0) < number]
        assert not {server.url(path) for path in again} & done
    assert len(list(out.glob("images/*/*"))) == 60  # and no temporary file


def test_only_temporary_failures_are_retried(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bad_server() as server:
        paths = ["/ok/1", "/status/404", "/status/503"]
        src = write_table(tmp_path / "u.csv", [server.url(path) for path in paths])

        def hits(retry: Retry) -> list[int]:
            server.hits.clear()
            run(src, out, retry)
            return [server.hits[path] for path in paths]

        assert hits("temporary") == [1, 1, 2]
        assert hits("temporary") == [0, 0, 2]
        assert hits("none") == [0, 0, 0]
        assert hits("all") == [0, 1, 2]
    assert [result["ok"] for result in lines_of(out / "results.jsonl")] == [True, False, False]


def test_longer_table_and_missing_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bad_server() as server:
        urls = [server.url(f"/ok/{number}") for number in range(4)]
        src = write_table(tmp_path / "u.csv", urls[:2])
        run(src, out)
        first, second = (out / row["image"] for row in lines_of(out / "table.jsonl"))
        write_table(src, [urls[3], *urls])
        first.unlink()
        second.write_bytes(b"cut")
        server.hits.clear()
        assert run(src, out).num_ok == 5
        del server.hits["/robots.txt"]
        assert server.hits == {f"/ok/{number}": 1 for number in range(4)}
        assert first.is_file() and second.stat().st_size > 3


def test_journal_that_was_cut_or_damaged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bad_server() as server:
        src = write_table(tmp_path / "u.csv", [server.url(f"/ok/{n}") for n in range(2)])
        run(src, out)
        journal = out / "journal.jsonl"
        whole = journal.read_bytes()
        journal.write_bytes(whole[:-20])
        server.hits.clear()
        assert run(src, out).num_ok == 2
        assert server.hits.total() == 2  # robots.txt and the one whose line was cut
        assert len(lines_of(journal)) == 2
        journal.write_bytes(b"x" + whole)
        with pytest.raises(DataError, match=r"journal\.jsonl line 1 is damaged"):
            run(src, out)


def test_folder_of_another_table_or_process(tmp_path: Path) -> None:
    from muomni.io.file_lock import exclusive_lock

    out = tmp_path / "out"
    with bad_server() as server:
        src = write_table(tmp_path / "u.csv", [server.url("/ok/1")])
        run(src, out)
        with pytest.raises(DataError, match=r"images of the table u\.csv, not images of v\.csv"):
            run(write_table(tmp_path / "v.csv", [server.url("/ok/2")]), out)
        with exclusive_lock(out / ".lock"), pytest.raises(DataError, match="another fetch"):
            run(src, out)


def test_progress_without_a_terminal(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muomni.io.count_progress.EVERY_S", 0.001)
    with bad_server() as server:
        run(write_table(tmp_path / "u.csv", [server.url("/ok/1")]), tmp_path / "out")
    # The last URL may be counted within a millisecond of the line before.
    assert "/1 (" in capsys.readouterr().err
