"""Fuzz the decoders of sharding and training: `python -m tests.data_prep.media.fuzz --count 10000`.

Each mutated file must give samples, or `DataError` or `BadSampleError`, within a time and a memory limit.
Workers are processes, so a crash of a decoder is seen. What sharding accepts, training must read.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from data_prep.corpus import BadSampleError, Clip
from data_prep.media.checks import checked_audio, checked_image
from data_prep.media.convert import read_media
from data_prep.options import Preprocessing
from muomni.data.media.audio import decode_declared_length
from muomni.data.media.decode import AudioFacts, decode_audio, read_audio
from muomni.data.media.formats import Kind
from muomni.data.media.image import decode_image
from muomni.errors import DataError
from tests.data_prep.media.originals import BY_FFMPEG, originals

MEMORY_BYTES = 1 << 30
TIMEOUT_S = 60.0
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
_HEADER_BYTES = 128
_REPORT_EVERY = 1000


@dataclass(frozen=True)
class Case:
    """A mutated file, which its number and the seed determine."""

    name: str
    kind: Kind
    data: bytes


def mutated(number: int, seed: int, files: dict[str, tuple[Kind, bytes]]) -> Case:
    """Mutation `number` of an original: flipped bits, a cut, a splice, or other header fields."""
    random = np.random.default_rng((seed, number))
    # ffmpeg takes a process per file.
    plain = [name for name in sorted(files) if name not in BY_FFMPEG]
    names = [*plain * 4, *(name for name in sorted(files) if name in BY_FFMPEG)]
    name = names[number % len(names)]
    kind, original = files[name]
    data = bytearray(original)
    how = ("bits", "cut", "splice", "header")[int(random.integers(4))]
    if how == "bits":
        for _ in range(int(random.integers(1, 33))):
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    elif how == "cut":
        data = data[: int(random.integers(len(data)))]
    elif how == "splice":
        other = files[sorted(files)[int(random.integers(len(files)))]][1]
        start, length = int(random.integers(len(other))), int(random.integers(1, 512))
        place, removed = int(random.integers(len(data))), int(random.integers(512))
        data[place : place + removed] = other[start : start + length]
    else:
        for _ in range(int(random.integers(1, 5))):
            place = int(random.integers(min(_HEADER_BYTES, len(data))))
            value = _EXTREMES[int(random.integers(len(_EXTREMES)))]
            width = int(random.choice((1, 2, 4, 8)))
            data[place : place + width] = bytes([value]) * len(data[place : place + width])
    return Case(f"{name}-{how}-{number}", kind, bytes(data))


def check(case: Case, path: Path) -> str:
    """Run a file through sharding and training; "decoded" or "refused". Any other exception is a fault."""
    path.write_bytes(case.data)
    stored = _shard(case.kind, path, Preprocessing())
    _shard(case.kind, path, Preprocessing(check="header"))
    if case.kind == "audio":
        with suppress(BadSampleError):
            read_media(Clip(str(path), 0.05, 0.1), "audio")
    with suppress(DataError):
        _read_as_training(case.kind, case.data)
    if stored is None:
        return "refused"
    _read_as_training(case.kind, stored)
    return "decoded"


def _shard(kind: Kind, path: Path, preprocessing: Preprocessing) -> bytes | None:
    """The bytes that sharding stores; None if it refuses the file."""
    try:
        if kind == "image":
            return checked_image.__wrapped__(str(path), preprocessing).data
        audio = checked_audio.__wrapped__(str(path), preprocessing)
    except BadSampleError:
        return None
    if preprocessing.check == "decode":
        assert audio.facts == AudioFacts.of(*read_audio(audio.data)), "other facts than in training"
    return audio.data


def _read_as_training(kind: Kind, data: bytes) -> None:
    if kind == "image":
        decode_image(data, 32)
    else:
        decode_audio(data)
        decode_declared_length(data)


def _serve(connection: Connection, memory_bytes: int, folder: str) -> None:
    """Check the cases that arrive, and answer with the outcome and the peak memory in bytes."""
    # Decoders print a line for each fault of a file.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    check(Case("first", "image", b""), Path(folder, "first"))
    decode_audio(originals()["wav-ulaw"][1])
    base_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = base_bytes + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        case = connection.recv()
        try:
            outcome = check(case, Path(folder, case.name))
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:300]
        Path(folder, case.name).unlink(missing_ok=True)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        connection.send((outcome, peak_bytes))


class _Worker:
    def __init__(self, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, MEMORY_BYTES, folder), daemon=True
        )
        self.process.start()
        theirs.close()
        self.case: Case | None = None
        self.deadline = 0.0

    def give(self, case: Case) -> None:
        self.case, self.deadline = case, time.monotonic() + TIMEOUT_S
        self.connection.send(case)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def fuzz(count: int, seed: int, num_workers: int) -> tuple[Counter[str], list[str], int]:
    """Check `count` mutated files; returns outcomes, faults, and the peak memory of a worker in bytes."""
    files = originals()
    cases: Iterator[Case] = (mutated(number, seed, files) for number in range(count))
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    peak_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        workers = [_Worker(folder) for _ in range(num_workers)]
        for worker, case in zip(workers, cases, strict=False):
            worker.give(case)
        while busy := [worker for worker in workers if worker.case is not None]:
            ready = wait([worker.connection for worker in busy], timeout=1)
            for worker in busy:
                assert worker.case is not None
                if worker.connection in ready:
                    try:
                        outcome, peak = worker.connection.recv()
                        peak_bytes = max(peak_bytes, peak)
                    except EOFError:
                        worker.process.join()
                        outcome = f"crash with exit code {worker.process.exitcode}"
                elif time.monotonic() > worker.deadline:
                    outcome = f"hang of more than {TIMEOUT_S:g} s"
                else:
                    continue
                if outcome in ("decoded", "refused"):
                    outcomes[outcome] += 1
                else:
                    faults.append(f"{worker.case.name}: {outcome}")
                    if outcome.startswith(("crash", "hang")):
                        worker.end()
                        workers[workers.index(worker)] = worker = _Worker(folder)
                worker.case = None
                num_done = outcomes.total() + len(faults)
                if num_done % _REPORT_EVERY == 0:
                    print(f"{num_done} files, {len(faults)} faults", *faults, file=sys.stderr)
                if case := next(cases, None):
                    worker.give(case)
        for worker in workers:
            worker.end()
    return outcomes, faults, peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    start = time.monotonic()
    outcomes, faults, peak_bytes = fuzz(arguments.count, arguments.seed, arguments.workers)
    print(
        f"{arguments.count} files, seed {arguments.seed}: {outcomes['decoded']} decoded, "
        f"{outcomes['refused']} refused, {len(faults)} faults, peak {peak_bytes / 2**20:.0f} MiB "
        f"per worker, {time.monotonic() - start:.0f} s"
    )
    print(*faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
