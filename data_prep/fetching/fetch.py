"""Download the files of a table of URLs into a folder that the readers take.

A run reads the table three times: to count and check, to download, and to write the tables of results.
"""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from filelock import Timeout
from yarl import URL

from data_prep.fetching.download import Client, Download, FetchError
from data_prep.fetching.journal import (
    Journal,
    Summary,
    digest_of,
    failed,
    json_line,
    stem_of,
    write_tables,
)
from data_prep.fetching.schedule import Job, Schedule
from data_prep.fetching.url_table import BAD_URL, UrlTable, parse_url
from data_prep.options import FetchOptions
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic
from muomni.io.count_progress import Progress, counted
from muomni.io.file_lock import exclusive_lock_if_supported

Retry = Literal["temporary", "all", "none"]
RETRIES: tuple[Retry, ...] = ("temporary", "all", "none")
MEDIA_FOLDERS = {"image": "images", "audio": "audio"}
_SOURCE_FILE = "source.json"
# URLs from which the next one to start is chosen.
_WINDOW = 20_000
# Few enough that running downloads do not wait.
_ROWS_AT_A_TIME = 256
_MAX_BACKOFF_S = 60.0
# A server with too many requests; all URLs of the host wait.
_BUSY = (429, 503)
# Progress is shown at least this often while nothing is finished.
_TICK_S = 5.0


class OpenProgress(Protocol):
    """`muomni.io.count_progress.open_progress`."""

    def __call__(
        self, total: int | None, name: str, unit: str = ...
    ) -> AbstractContextManager[Progress]: ...


@dataclass(slots=True)
class Survey:
    """What a table holds, and what of it a run has to fetch. `pending` are digests of URLs."""

    num_rows: int = 0
    num_repeated: int = 0
    num_stored: int = 0
    num_failed: int = 0
    bad_rows: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)
    pending: set[int] = field(default_factory=set)


@contextmanager
def open_folder(folder: Path, table: UrlTable) -> Iterator[Journal]:
    """The journal of a folder, which is created if needed and locked for this process.

    Raises `DataError` if another process uses it, or it belongs to another table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock_if_supported(folder / ".lock", blocking=False))
        except Timeout:
            raise DataError(f"another fetch writes {folder}; wait for it") from None
        _check_source(folder, table)
        for path in folder.glob(f"{MEDIA_FOLDERS[table.path_column]}/*/.*.tmp-*"):
            path.unlink(missing_ok=True)  # of a run that was killed
        journal = Journal(folder)
        stack.callback(journal.close)
        yield journal


def survey(table: UrlTable, journal: Journal | None, retry: Retry) -> Survey:
    """Read the whole table, which finds its errors before the first download."""
    found = Survey()
    seen: set[int] = set()
    for row in counted(table.rows(), None, f"{table.src.name} (check)", "rows"):
        found.num_rows += 1
        json_line(row.values)  # else the results could not be written after all downloads
        if row.target is None:
            found.bad_rows[row.problem.reason if row.problem else BAD_URL] += 1
            continue
        digest = digest_of(row.url)
        if digest in seen:
            found.num_repeated += 1
            continue
        seen.add(digest)
        result = journal.get(digest) if journal else None
        if result and result["ok"]:
            found.num_stored += 1
        elif result and (retry == "none" or (retry == "temporary" and not result["temporary"])):
            found.num_failed += 1
        else:
            found.pending.add(digest)
            found.hosts[row.target.raw_host or ""] += 1
    if not found.num_rows:
        raise DataError(f"{table.src} has no rows; check --src")
    return found


def fetch(
    table: UrlTable,
    folder: Path,
    options: FetchOptions,
    retry: Retry,
    open_progress: OpenProgress,
) -> Summary:
    """Download what is missing, and write the tables; raises `DataError` as `open_folder` and the table do."""
    with open_folder(folder, table) as journal:
        pending = survey(table, journal, retry).pending
        _record_source(folder, table)
        with open_progress(len(pending), f"{folder.name} (fetch)", "URLs") as progress:
            asyncio.run(_Run(table, folder, options, journal, progress).run(pending))
        return write_tables(table, journal, folder)


class _Run:
    """The downloads of one run."""

    def __init__(
        self,
        table: UrlTable,
        folder: Path,
        options: FetchOptions,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self._table, self._folder, self._options = table, folder, options
        self._journal, self._progress = journal, progress
        self._media = MEDIA_FOLDERS[options.kind]
        self._schedule = Schedule(options, time.monotonic)

    async def run(self, pending: set[int]) -> None:
        """Download all URLs of the table whose digests are in `pending`."""
        jobs = self._jobs(pending)
        running: set[asyncio.Task[None]] = set()
        # Threads look up hosts and sync files.
        executor = ThreadPoolExecutor(self._options.num_connections)
        asyncio.get_running_loop().set_default_executor(executor)
        async with Client(self._options) as client:
            is_read = False
            while True:
                if not is_read and self._schedule.num_pending < _WINDOW:
                    is_read = not self._read(jobs)
                while len(running) < self._options.num_connections:
                    job = self._schedule.start()
                    if job is None:
                        break
                    running.add(asyncio.create_task(self._request(client, job)))
                if is_read and not running and not self._schedule.num_pending:
                    return
                running = await self._wait(running, is_read)
                self._progress.update(0)

    def _jobs(self, pending: set[int]) -> Iterator[Job | None]:
        """The URLs to download, each once, and None for other rows."""
        for row in self._table.rows():
            if row.target is None or (digest := digest_of(row.url)) not in pending:
                yield None
            else:
                pending.remove(digest)
                yield Job(row.url, digest, row.target)
            if not pending:
                return

    def _read(self, jobs: Iterator[Job | None]) -> bool:
        """Schedule URLs of the next rows; returns whether there may be more."""
        num_read = 0
        for job in itertools.islice(jobs, _ROWS_AT_A_TIME):
            num_read += 1
            if job:
                self._schedule.add(job)
        return num_read == _ROWS_AT_A_TIME

    async def _wait(
        self, running: set["asyncio.Task[None]"], is_read: bool
    ) -> set["asyncio.Task[None]"]:
        """Wait until a request ends or another may start; returns those still running.

        Raises what a request raised, such as OSError for a full disk.
        """
        wait_s = self._schedule.wait_s()
        is_full = len(running) >= self._options.num_connections
        timeout_s = _TICK_S if wait_s is None or is_full else min(wait_s, _TICK_S)
        if not is_read and self._schedule.num_pending < _WINDOW:
            timeout_s = 0.0
        if not running:
            await asyncio.sleep(timeout_s)
            return running
        done, running = await asyncio.wait(
            running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()
        return running

    async def _request(self, client: Client, job: Job) -> None:
        """Make a request, and record its result or schedule the next one for the URL."""
        name, target = job.host, job.target
        failure = self._schedule.closed(name)
        if failure:
            self._schedule.finish(name, failure)
            self._end(job, failure)
            return
        stem = self._folder / self._media / stem_of(job.digest)
        try:
            got = await client.request(target, stem)
        except FetchError as error:
            if error.http_status in _BUSY and not error.wait_s:
                error.wait_s = min(self._backoff_s(job), self._options.max_wait_s)
            if error.wait_s:
                self._schedule.pause(name, error)
            self._schedule.finish(name, error, client.crawl_delay_s(target))
            self._retry(job, error)
            return
        self._schedule.finish(name, None, client.crawl_delay_s(target))
        if isinstance(got, Download):
            self._store(job, got)
        else:
            self._redirect(job, got)

    def _redirect(self, job: Job, target: URL) -> None:
        job.num_redirects += 1
        if job.num_redirects > self._options.max_redirects:
            self._end(
                job, FetchError("redirects", f"more than {self._options.max_redirects} redirects")
            )
            return
        job.target = target
        self._schedule.add(job)

    def _retry(self, job: Job, error: FetchError) -> None:
        """Schedule another attempt from the URL of the table, or record the failure."""
        is_last = job.num_attempts + 1 >= self._options.num_attempts
        if not error.is_temporary or is_last or error.wait_s > self._options.max_wait_s:
            self._end(job, error)
            return
        wait_s = max(error.wait_s, self._backoff_s(job))
        job.num_attempts += 1
        job.target, job.num_redirects = parse_url(job.url), 0
        self._schedule.add(job, wait_s)

    def _backoff_s(self, job: Job) -> float:
        """The wait before another attempt, partly random, so that URLs that failed together are kept apart."""
        longest_s = min(self._options.first_wait_s * 2**job.num_attempts, _MAX_BACKOFF_S)
        return longest_s * random.uniform(0.5, 1)

    def _store(self, job: Job, download: Download) -> None:
        result = {
            "url": job.url,
            "ok": True,
            "temporary": False,
            "http_status": download.http_status,
            "reason": "",
            "message": "",
            "path": str(download.path.relative_to(self._folder)),
            "bytes": download.num_bytes,
            "sha256": download.sha256,
            "content_type": download.content_type,
            "final_url": str(job.target),
        }
        self._journal.add(job.digest, result)
        self._progress.update(1)

    def _end(self, job: Job, error: FetchError) -> None:
        result = failed(
            error.reason,
            str(error),
            is_temporary=error.is_temporary,
            http_status=error.http_status,
        )
        self._journal.add(job.digest, {"url": job.url, **result, "final_url": str(job.target)})
        self._progress.update(1)


def _source(table: UrlTable) -> dict[str, str]:
    return {"table": table.src.resolve().name, "media": MEDIA_FOLDERS[table.path_column]}


def _record_source(folder: Path, table: UrlTable) -> None:
    write_atomic(folder / _SOURCE_FILE, (json.dumps(_source(table)) + "\n").encode())


def _check_source(folder: Path, table: UrlTable) -> None:
    """Raise `DataError` if the folder belongs to another table or kind of media."""
    path, source = folder / _SOURCE_FILE, _source(table)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        raise DataError(f"{path} is damaged; delete it, and rerun") from None
    if known != source:
        raise DataError(
            f"{folder} holds {known.get('media')} of the table {known.get('table')}, not "
            f"{source['media']} of {source['table']}; use another --out"
        )
