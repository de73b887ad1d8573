"""Which request starts when: limits per host, rates, and waits.

Redirects and retries are scheduled like first requests, so that all limits hold for them, too.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from yarl import URL

from data_prep.fetching.download import FetchError
from data_prep.options import FetchOptions

# A host is given up for this run after so many failed connections in a row.
MAX_HOST_FAILURES = 20


@dataclass(slots=True)
class Job:
    """A URL of the table and its next request."""

    url: str
    digest: int
    target: URL
    num_attempts: int = 0
    num_redirects: int = 0

    @property
    def host(self) -> str:
        """Name and port; the limits per host apply to it."""
        return f"{(self.target.raw_host or '').lower()}:{self.target.port}"


@dataclass(slots=True)
class _Host:
    """Requests of a host: waiting, running, and when the next may start."""

    interval_s: float
    queue: deque[Job] = field(default_factory=deque)
    num_running: int = 0
    ready_s: float = 0.0
    num_failures: int = 0
    closed: FetchError | None = None
    # Until the first answer, which may ask for a crawl delay, there is one request at a time.
    is_known: bool = False
    is_listed: bool = False


class Schedule:
    """Jobs in the order in which they may start. `clock` returns seconds."""

    def __init__(self, options: FetchOptions, clock: Callable[[], float]) -> None:
        self._options, self._clock = options, clock
        self._hosts: dict[str, _Host] = {}
        # Hosts with waiting jobs and free connections, and jobs that wait, by the time of their start.
        self._ready: list[tuple[float, int, str]] = []
        self._waiting: list[tuple[float, int, Job]] = []
        self._next_s = 0.0
        self._number = itertools.count()
        self.num_pending = 0

    def add(self, job: Job, wait_s: float = 0.0) -> None:
        """Let a job start after `wait_s` seconds at the earliest."""
        self.num_pending += 1
        if wait_s > 0:
            heapq.heappush(self._waiting, (self._clock() + wait_s, next(self._number), job))
            return
        host = self._host(job.host)
        host.queue.append(job)
        self._list(job.host, host)

    def start(self) -> Job | None:
        """Take the next job that may start now, if any; `finish` must follow."""
        now = self._clock()
        while self._waiting and self._waiting[0][0] <= now:
            self.num_pending -= 1
            self.add(heapq.heappop(self._waiting)[2])
        if now < self._next_s:
            return None
        while self._ready and self._ready[0][0] <= now:
            name = heapq.heappop(self._ready)[2]
            host = self._hosts[name]
            host.is_listed = False
            if not host.queue or (host.ready_s > now and not host.closed):
                self._list(name, host)
                continue
            job = host.queue.popleft()
            self.num_pending -= 1
            host.num_running += 1
            if not host.closed:
                host.ready_s = now + host.interval_s
                self._next_s = now + (1 / self._options.rate if self._options.rate else 0.0)
            self._list(name, host)
            return job
        return None

    def wait_s(self) -> float | None:
        """Seconds until a job may start; None if that depends on running jobs."""
        times = [queue[0][0] for queue in (self._ready, self._waiting) if queue]
        return max(0.0, min(times) - self._clock(), self._next_s - self._clock()) if times else None

    def finish(self, name: str, failure: FetchError | None, crawl_delay_s: float = 0.0) -> None:
        """End a job of a host, and close the host if it does not answer or asks for too long waits."""
        host = self._hosts[name]
        host.num_running -= 1
        host.interval_s = max(host.interval_s, crawl_delay_s)
        if crawl_delay_s > self._options.max_wait_s and not host.closed:
            message = f"robots.txt asks for {crawl_delay_s:g} s between requests"
            host.closed = FetchError("robots", message, is_temporary=True)
        if failure is None or failure.reason not in FetchError.UNREACHABLE:
            host.is_known, host.num_failures = True, 0
        else:
            host.num_failures += 1
            if host.num_failures >= MAX_HOST_FAILURES and not host.closed:
                message = f"{failure}, {MAX_HOST_FAILURES} times in a row, so the host was given up"
                host.closed = FetchError(failure.reason, message, is_temporary=failure.is_temporary)
        self._list(name, host)

    def pause(self, name: str, failure: FetchError) -> None:
        """Start no request to a host for the time that it asks for; if that is too long, close the host."""
        host = self._hosts[name]
        if failure.wait_s > self._options.max_wait_s:
            host.closed = failure
        else:
            host.ready_s = max(host.ready_s, self._clock() + failure.wait_s)

    def closed(self, name: str) -> FetchError | None:
        """Why a host gets no more requests in this run, if so."""
        return self._hosts[name].closed

    def _host(self, name: str) -> _Host:
        return self._hosts.setdefault(name, _Host(1 / self._options.host_rate))

    def _list(self, name: str, host: _Host) -> None:
        """List a host with a waiting job and a free connection; forget one without jobs."""
        if host.is_listed:
            return
        limit = self._options.num_per_host if host.is_known else 1
        if host.queue and host.num_running < limit:
            start_s = 0.0 if host.closed else host.ready_s
            heapq.heappush(self._ready, (start_s, next(self._number), name))
            host.is_listed = True
        elif not (host.queue or host.num_running or host.closed):
            if host.ready_s <= self._clock():
                self._hosts.pop(name, None)
            else:
                heapq.heappush(self._ready, (host.ready_s, next(self._number), name))
                host.is_listed = True
