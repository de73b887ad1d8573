"""Time and memory to open a corpus of 10^9 samples and seek in it, on one rank of thousands.

    OMP_NUM_THREADS=1 python benchmarks/plan_scale.py --work /tmp/plan_scale --json result.json

Writes a manifest of 100,000 shards of 10,000 audio clips; the sidecars are hard links to a few hundred
distinct files, and the tars are sparse files of the correct size. A new process then opens source and plan
as `launch/train.py` does, counts the micro-batches in its shard of the shuffle windows of epoch 0, and seeks
to random micro-batches. The counts of other ranks, gathered over the network in a real run, repeat its own
counts except for the windows to seek to.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from muomni.errors import exit_on_error

_SHARD_SAMPLES = 10_000


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--work", type=Path, required=True, help="folder for the corpus")
    flags.add_argument("--samples", type=int, default=10**9)
    flags.add_argument("--distinct", type=int, default=256, help="number of distinct sidecars")
    flags.add_argument("--ranks", type=int, default=4096)
    flags.add_argument("--rank", type=int, default=1234)
    flags.add_argument("--seeks", type=int, default=200)
    flags.add_argument(
        "--mode",
        choices=("fixed", "bucket", "pack"),
        help="measure only this mode, in this process",
    )
    flags.add_argument("--check-files", action="store_true", help="check all files, as rank 0 does")
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with exit_on_error("plan_scale"):
        if arguments.mode:
            print(json.dumps(measure(arguments)))
            return
        write_corpus(arguments.work / "speech", arguments.samples, arguments.distinct)
        print(f"{'':20}{'fixed':>14}{'bucket':>14}{'pack':>14}")
        results = {mode: _in_new_process(mode, arguments) for mode in ("fixed", "bucket", "pack")}
    for name in next(iter(results.values())):
        print(f"{name:20}" + "".join(f"{row[name]:>14,.2f}" for row in results.values()))
    if arguments.json:
        settings = {
            key: getattr(arguments, key) for key in ("samples", "distinct", "ranks", "rank")
        }
        content = {"modes": results, **settings, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_corpus(root: Path, num_samples: int, num_distinct: int) -> None:
    """Write a speech dataset of `num_samples` audio clips, without audio data."""
    from muomni.data.shards.manifest import MANIFEST_NAME, Manifest, Split, fingerprint

    num_shards = -(-num_samples // _SHARD_SAMPLES)
    if (root / MANIFEST_NAME).is_file():
        if Manifest.load(root).split("train").num_samples == num_samples:
            return
        raise SystemExit(f"{root} contains another corpus; delete it")
    (root / "train").mkdir(parents=True)
    random = np.random.default_rng(0)
    originals = [
        _write_original(root, number, random) for number in range(min(num_distinct, num_shards))
    ]
    records = []
    for number in range(num_shards):
        original = originals[number % len(originals)]
        path = f"train/speech-train-{number:06d}.tar"
        for suffix in (".tar", ".tar.idx", ".cols.npy"):
            name = str(root / original.path).removesuffix(".tar") + suffix
            if number >= len(originals):
                os.link(name, str(root / path).removesuffix(".tar") + suffix)
        records.append(original.model_copy(update={"path": path}))
    splits = {"train": Split(shards=tuple(records))}
    manifest = Manifest(
        root=root, name="speech", task="speech", reader="none", split_rule="given",
        fingerprint=fingerprint(splits), splits=splits,
    )  # fmt: skip
    (root / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _write_original(root: Path, number: int, random: np.random.Generator) -> Any:
    from muomni.data.shards.manifest import COLUMNS, ShardRecord, Totals
    from muomni.data.shards.tar_index import index_path, write_index
    from muomni.data.shards.writer import columns_path

    path = f"train/speech-train-{number:06d}.tar"
    columns = np.zeros(_SHARD_SAMPLES, dtype=COLUMNS)
    # Durations of read speech: mostly 10 to 16 s, with a tail of short ones.
    columns["duration_ms"] = 1000 * np.clip(17 - random.gamma(2.0, 2.5, _SHARD_SAMPLES), 1.2, 17)
    columns["num_bytes"] = columns["duration_ms"] * 16
    columns["num_chars"] = columns["duration_ms"] // 70
    for name in ("key_hash", "group_hash", "content_hash"):
        columns[name] = random.integers(0, 2**63, _SHARD_SAMPLES)
    columns["num_audios"] = 1
    ends = np.cumsum(columns["num_bytes"].astype(np.uint64) + 1024)
    offsets = np.concatenate([np.zeros(1, dtype=np.uint64), ends])
    write_index(index_path(root / path), offsets)
    np.save(columns_path(root / path), columns)
    num_bytes = int(ends[-1]) + 1024
    os.truncate(os.open(root / path, os.O_CREAT | os.O_WRONLY), num_bytes)
    return ShardRecord(
        path=path, split="train", num_samples=_SHARD_SAMPLES, num_bytes=num_bytes, sha256="0" * 64,
        index_sha256="0" * 64, columns_sha256="0" * 64, totals=Totals.of_columns(columns),
        num_planned=_SHARD_SAMPLES,
    )  # fmt: skip


def _in_new_process(mode: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure each mode, with and without file checks, in its own process, for its peak memory."""

    def run(*extra: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--mode", mode, "--work", str(arguments.work), *extra]
        for name in ("ranks", "rank", "seeks"):
            command += [f"--{name}", str(getattr(arguments, name))]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    checked = run("--check-files")
    row = run()
    rank_0 = {f"rank_0_{name}": checked[name] for name in ("open_s", "open_cpu_s", "peak_mb")}
    return {**row, **rank_0}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Open the corpus, count the rank's shard, and seek, in this process."""
    from muomni.data.sampling.lengths import mel_frames
    from muomni.data.sampling.order import SampleOrder
    from muomni.data.sampling.plan import Batching, Plan
    from muomni.data.shards.manifest import Manifest
    from muomni.data.shards.source import Source

    imports_mb = _peak_mb()
    with Stopwatch() as opening:
        manifest = Manifest.load(arguments.work / "speech")
        source = Source([manifest], "train", check_files=arguments.check_files)
        batching = {
            "fixed": Batching("fixed", 64, 64),
            "bucket": Batching("bucket", 800 * 100, 200 * 100),
            "pack": Batching("pack", 4, 4, seq_len=4096),
        }[arguments.mode]
        order = SampleOrder(source.all_included, 0, batching.shuffle_window)
        plan = Plan(mel_frames(source), batching, 0, source.describe, order)
    num_windows = plan.windows.count
    random = np.random.default_rng(1)
    targets = random.integers(0, num_windows - 1, arguments.seeks)
    with Stopwatch() as counting:
        if arguments.mode == "fixed":
            numbers = targets * (batching.shuffle_window // batching.global_size)
        else:
            first, last = (num_windows * (arguments.rank + i) // arguments.ranks for i in range(2))
            share = plan.count_windows(0, first, last)
    if arguments.mode != "fixed":
        numbers = _set_counts(plan, share, targets)
    seeks = []
    for number in numbers.tolist():
        with Stopwatch() as seeking:
            assert plan.rank_step(number, 0, 1)[0].ids
        seeks.append(seeking)
    return {
        "open_s": round(opening.wall_s, 3),
        "open_cpu_s": round(opening.cpu_s, 3),
        "count_share_cpu_s": round(counting.cpu_s, 3),
        "windows": num_windows,
        "imports_mb": round(imports_mb, 1),
        "peak_mb": round(_peak_mb(), 1),
        "seek_ms_median": round(1000 * statistics.median(seek.wall_s for seek in seeks), 3),
        "seek_ms_max": round(1000 * max(seek.wall_s for seek in seeks), 3),
        "seek_cpu_ms_median": round(1000 * statistics.median(seek.cpu_s for seek in seeks), 3),
        "seek_cpu_ms_max": round(1000 * max(seek.cpu_s for seek in seeks), 3),
    }


def _set_counts(plan: Any, share: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Set exact counts for the windows `targets` and their successors, and typical counts for all others.

    Returns the number of a step that starts in each target.
    """
    counts = np.resize(share, plan.windows.count)
    for window in np.unique(np.concatenate([targets, targets + 1])).tolist():
        counts[window] = plan.count_windows(0, window, window + 1)[0]
    plan.set_counts(0, counts)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return -(-starts[targets] // (plan.batching.units_per_step or 1))


class Stopwatch:
    """Measures wall-clock and CPU seconds of its block."""

    def __enter__(self) -> "Stopwatch":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall_s = time.perf_counter() - self._wall
        self.cpu_s = time.process_time() - self._cpu


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
