"""Write the shards of a plan: in this process, in a pool, or as a task of a job array.

Task t of N writes the shards s with s mod N = t. Finished shards (whose records have the same digests)
are skipped, so a rerun after a kill gives the same bytes for any number of workers and tasks.
"""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from time import monotonic

from data_prep.corpus import BadSampleError, Item
from data_prep.curation.exclude import refuse_masks
from data_prep.filters import split_dropped
from data_prep.media.located import located
from data_prep.options import FILTER_REASONS, Filters, Preprocessing
from data_prep.sharding.encode import encode
from data_prep.sharding.listings import FILTERED, QUARANTINE, all_listed, printable, store_listing
from data_prep.sharding.shard_plan import PlannedShard, ShardingOptions, ShardPlan
from muomni.data.shards.manifest import MANIFEST_NAME, ShardRecord, Task
from muomni.data.shards.writer import ShardWriter, load_record
from muomni.errors import DataError, MachineError
from muomni.io.count_progress import Progress

_POLL_S = 0.5
_COUNT_EVERY = 50
_counter: Synchronized | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    root: Path
    shard: PlannedShard
    task: Task
    filters: Filters
    preprocessing: Preprocessing
    digest: str
    sources_digest: str

    @classmethod
    def of(cls, root: Path, shard: PlannedShard, options: ShardingOptions, digest: str) -> "_Job":
        """The job for the current state of a shard's source files."""
        sources = digest_of_sources(shard.items)
        return cls(
            root, shard, options.task, options.filters, options.preprocessing, digest, sources
        )


def write_shards(
    plan: ShardPlan, root: Path, num_workers: int, task: tuple[int, int], progress: Progress
) -> None:
    """Write the unfinished shards of array task `task` = (index, number of tasks).

    Raises `DataError` as soon as there are more bad samples than the plan allows in total, and
    `MachineError` if a worker is killed.
    """
    index, num_tasks = task
    jobs = []
    num_bad = 0
    for shard in plan.shards[index::num_tasks]:
        job = _Job.of(root, shard, plan.options, plan.digest)
        record = load_record(root / shard.path)
        if record and _is_current(root, record, plan.digest, job.sources_digest):
            progress.update(len(shard.items))
            num_bad += _num_bad(record)
            continue
        jobs.append(job)
    if not jobs:
        return
    refuse_masks(root)
    # The shards change from here on, so an earlier manifest is invalid.
    (root / MANIFEST_NAME).unlink(missing_ok=True)
    limit = plan.options.max_bad_fraction * plan.num_items
    for record in _run(jobs, min(num_workers, len(jobs)), progress):
        num_bad += _num_bad(record)
        if num_bad > limit:
            raise too_many_bad(root, num_bad, plan.num_items, plan.options.max_bad_fraction)


def write_retry_shards(
    shards: tuple[PlannedShard, ...],
    options: ShardingOptions,
    digest: str,
    root: Path,
    num_workers: int,
    progress: Progress,
) -> list[ShardRecord]:
    """Write additional shards of a finished dataset, and return their records."""
    jobs = [_Job.of(root, shard, options, digest) for shard in shards]
    return list(_run(jobs, min(num_workers, len(jobs)), progress))


def _num_bad(record: ShardRecord) -> int:
    bad, _ = split_dropped(record.dropped)
    return sum(bad.values())


def digest_of_sources(items: tuple[Item, ...]) -> str:
    """Digest of path, size, and time of all source files; it changes when one is repaired."""
    digest = hashlib.sha256()
    for path in dict.fromkeys(path for item in items for path in item.files):
        try:
            stat = os.stat(located(path))
            state = f"{stat.st_size}:{stat.st_mtime_ns}"
        except (OSError, ValueError, BadSampleError):
            # Missing files and invalid names are part of the state: the sample is quarantined until it exists.
            state = "missing"
        line = f"{os.path.basename(path)}:{state}\n"
        digest.update(line.encode(errors="surrogatepass"))
    return digest.hexdigest()


def too_many_bad(root: Path, num_bad: int, num_items: int, max_fraction: float) -> DataError:
    """The error for too many bad samples, which names the first one."""
    first = next(all_listed(root / QUARANTINE))
    return DataError(
        f"{num_bad} of {num_items} samples are bad ({num_bad / num_items:.2%}), more than "
        f"--max-bad-fraction {max_fraction:g}; the first is {first['key']} ({first['source']}): "
        f"{first['message']}; all are listed in {root / QUARANTINE}: fix them, or raise the limit"
    )


def _is_current(root: Path, record: ShardRecord, digest: str, sources_digest: str) -> bool:
    """Whether the shard was finished from the same plan and source files."""
    path = root / record.path
    return (
        record.config_digest == digest
        and record.sources_digest == sources_digest
        and path.is_file()
        and path.stat().st_size == record.num_bytes
    )


def _run(jobs: list[_Job], num_workers: int, progress: Progress) -> Iterator[ShardRecord]:
    if num_workers <= 1:
        for job in jobs:
            yield _write_shard(job, progress)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    shown = 0
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (counter,))
    try:
        # Bound the queue: items are pickled when submitted.
        waiting = iter(jobs)
        running: set[Future[ShardRecord]] = set()
        while True:
            for job in waiting:
                running.add(pool.submit(_write_shard, job, None))
                if len(running) >= 2 * num_workers:
                    break
            if not running:
                break
            done, running = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            progress.update(counter.value - shown)
            shown = counter.value
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "a worker process was killed (out of memory?); run the command again with fewer "
            "--workers to continue"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(counter: Synchronized) -> None:
    """Share the progress counter, and exit when the parent process is killed."""
    global _counter
    _counter = counter
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _SharedProgress:
    """Counts samples in memory shared with the parent process."""

    def update(self, n: int) -> None:
        assert _counter is not None
        with _counter.get_lock():
            _counter.value += n


def _write_shard(job: _Job, progress: Progress | None) -> ShardRecord:
    """Write one shard, the listings of its skipped samples, and its record."""
    report = _SharedProgress() if progress is None else progress
    skipped: list[dict[str, str]] = []
    dropped: dict[str, int] = {}
    with ShardWriter(job.root, job.shard.path, job.shard.split) as writer:
        writer.config_digest = job.digest
        writer.sources_digest = job.sources_digest
        writer.num_planned = len(job.shard.items)
        shown, next_report = 0, monotonic()
        for number, item in enumerate(job.shard.items, start=1):
            try:
                sample = encode(item, job.task, job.filters, job.preprocessing)
                writer.add(item.key, sample.members, item.group, sample.cost)
            except BadSampleError as error:
                reason = error.problem.reason
                dropped[reason] = dropped.get(reason, 0) + 1
                skipped.append(
                    {
                        "key": item.key,
                        "source": printable(item.source),
                        "reason": reason,
                        "message": printable(error.problem.message),
                    }
                )
            if number % _COUNT_EVERY == 0 or monotonic() > next_report:
                report.update(number - shown)
                shown, next_report = number, monotonic() + _POLL_S
        report.update(len(job.shard.items) - shown)
        writer.dropped = dropped
        filtered = [each for each in skipped if each["reason"] in FILTER_REASONS]
        bad = [each for each in skipped if each["reason"] not in FILTER_REASONS]
        store_listing(job.root / QUARANTINE, job.shard.path, bad)
        store_listing(job.root / FILTERED, job.shard.path, filtered)
    assert writer.record is not None
    return writer.record
