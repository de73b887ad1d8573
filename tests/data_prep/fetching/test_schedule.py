"""Order and times of requests, with a fake clock."""

from yarl import URL

from data_prep.fetching.download import FetchError
from data_prep.fetching.schedule import MAX_HOST_FAILURES, Job, Schedule
from data_prep.options import FetchOptions

LOST = FetchError("connection", "no answer", is_temporary=True)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def schedule_of(*urls: str, **options: object) -> tuple[Schedule, Clock]:
    clock = Clock()
    given = {"host_rate": 1000.0, **options}
    schedule = Schedule(FetchOptions(**given), clock)  # type: ignore[arg-type]
    for number, url in enumerate(urls):
        schedule.add(Job(url, number, URL(url)))
    return schedule, clock


def started(schedule: Schedule) -> list[str]:
    jobs = iter(schedule.start, None)
    return [job.url for job in jobs]


def test_a_new_host_gets_one_request_until_it_answers() -> None:
    schedule, clock = schedule_of(*(f"http://a/{n}" for n in range(9)), num_per_host=3)
    assert started(schedule) == ["http://a/0"] and schedule.wait_s() is None
    schedule.finish("a:80", None)
    for expected in ("http://a/1", "http://a/2", "http://a/3"):
        clock.now += 1
        assert started(schedule) == [expected]
    clock.now += 1
    assert started(schedule) == [] and schedule.num_pending == 5


def test_hosts_do_not_wait_for_each_other() -> None:
    urls = [*(f"http://a/{n}" for n in range(5)), "http://b/0", "https://a/0"]
    assert set(started(schedule_of(*urls)[0])) == {"http://a/0", "http://b/0", "https://a/0"}


def test_rates_and_crawl_delay() -> None:
    schedule, clock = schedule_of(*(f"http://h{n}/" for n in range(3)), rate=2.0)
    assert len(started(schedule)) == 1 and schedule.wait_s() == 0.5
    clock.now += 0.5
    assert len(started(schedule)) == 1
    schedule, clock = schedule_of("http://a/0", "http://a/1", "http://a/2", host_rate=10.0)
    schedule.start()
    schedule.finish("a:80", None, crawl_delay_s=4.0)
    clock.now += 0.1
    assert started(schedule) == ["http://a/1"]
    clock.now += 3.9
    assert started(schedule) == []
    clock.now += 0.1
    assert started(schedule) == ["http://a/2"]


def test_host_with_too_long_a_crawl_delay_is_closed() -> None:
    schedule, clock = schedule_of("http://a/0", "http://a/1", max_wait_s=10.0)
    schedule.start()
    schedule.finish("a:80", None, crawl_delay_s=11.0)
    clock.now += 0.1
    assert started(schedule) == ["http://a/1"]
    closed = schedule.closed("a:80")
    assert closed and closed.reason == "robots" and closed.is_temporary


def test_waits() -> None:
    schedule, clock = schedule_of("http://a/0")
    schedule.add(Job("http://b/", 9, URL("http://b/")), wait_s=5)
    assert started(schedule) == ["http://a/0"] and schedule.wait_s() == 5
    clock.now += 5
    assert started(schedule) == ["http://b/"] and schedule.num_pending == 0


def test_pause() -> None:
    schedule, clock = schedule_of("http://a/0", "http://a/1", max_wait_s=10.0)
    schedule.start()
    asks = FetchError("http-429", "later", is_temporary=True, wait_s=10)
    schedule.pause("a:80", asks)
    schedule.finish("a:80", asks)
    clock.now += 9
    assert started(schedule) == []
    clock.now += 1
    assert started(schedule) == ["http://a/1"]
    schedule.add(Job("http://a/2", 2, URL("http://a/2")))
    schedule.pause("a:80", FetchError("http-429", "later", is_temporary=True, wait_s=11))
    schedule.finish("a:80", asks)
    clock.now += 0.002
    assert started(schedule) == ["http://a/2"]
    closed = schedule.closed("a:80")
    assert closed and closed.reason == "http-429"


def test_host_that_does_not_answer_is_closed() -> None:
    schedule, clock = schedule_of(*(f"http://a/{n}" for n in range(MAX_HOST_FAILURES + 2)))
    for _ in range(MAX_HOST_FAILURES):
        assert schedule.start() and not schedule.closed("a:80")
        schedule.finish("a:80", LOST)
        clock.now += 1
    assert schedule.start()
    closed = schedule.closed("a:80")
    assert closed and closed.reason == "connection" and closed.is_temporary


def test_an_answer_resets_the_failures() -> None:
    schedule, clock = schedule_of(*(f"http://a/{n}" for n in range(2 * MAX_HOST_FAILURES)))
    for number in range(2 * MAX_HOST_FAILURES):
        assert schedule.start() and not schedule.closed("a:80")
        refused = FetchError("http-404", "gone", http_status=404)
        schedule.finish("a:80", refused if number == MAX_HOST_FAILURES - 1 else LOST)
        clock.now += 1


def test_finished_hosts_are_forgotten() -> None:
    schedule, clock = schedule_of(*(f"http://h{n}/" for n in range(50)))
    for job in iter(schedule.start, None):
        schedule.finish(job.host, None)
    clock.now += 1
    schedule.start()
    assert schedule._hosts == {} and schedule.wait_s() is None
