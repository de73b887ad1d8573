"""Time to the first batch of a run that resumes mid-epoch.

    OMP_NUM_THREADS=1 python benchmarks/resume.py --json benchmarks/results/resume.json

Source, plan, and loader are created again for each kind of batching (fixed: images with captions, bucket:
audio clips, pack: texts), number of workers, and position in the epoch. Files are in the page cache.

seek_s: the plan seeks to the micro-batch, and counts the windows of the epoch if needed.
first_s: from the start of the worker that produces the first batch (after its imports), or without workers
from the request, until the batch arrives. total_s: includes the start of the workers.

Each round runs all cases once; medians over rounds are reported.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generated_corpora import Sample, audio_clips, images, texts, write_dataset
from benchmarks.machine import machine_facts
from data_prep.train_tokenizer import train_tokenizer
from muomni.data.loading.loader import LoadedBatch, Loader, PlannedDataset
from muomni.data.sampling.plan import Batching, MicroBatch, Plan
from muomni.data.shards.manifest import Manifest, Task
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.views.base import View
from muomni.data.views.image_text import ImageTextView
from muomni.data.views.speech import SpeechView
from muomni.data.views.text import TextView
from muomni.errors import exit_on_error

_POSITIONS = (0.0, 0.25, 0.9)
_TARGET_S = 1.0
_MICRO_BATCHES_PER_STEP = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A corpus, its view, and its batching."""

    manifest: Manifest
    view: View[Any]
    batching: Batching


class StampedDataset(PlannedDataset):
    """Adds to each batch the time at which its process received the dataset (`started_s`)."""

    def __init__(self, source: Source, view: View[Any]) -> None:
        super().__init__(source, view, seed=0)
        self.started_s = time.perf_counter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The clock is shared by all processes of the machine.
        self.started_s = time.perf_counter()

    def __getitem__(self, batch: MicroBatch) -> LoadedBatch:
        started_s = torch.tensor(self.started_s, dtype=torch.float64)
        loaded = super().__getitem__(batch)
        return loaded._replace(tensors={**loaded.tensors, "started_s": started_s})


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--images", type=int, default=4000)
    flags.add_argument("--audio-clips", type=int, default=2000)
    flags.add_argument("--texts", type=int, default=100_000)
    flags.add_argument("--workers", default="0,2")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with exit_on_error("resume"), tempfile.TemporaryDirectory() as folder:
        rows = measure(make_cases(Path(folder), arguments), arguments)
    print(f"{'batching':10}{'workers':>8}{'position':>10}{'seek_s':>9}{'first_s':>9}{'total_s':>9}")
    for row in rows:
        print(
            f"{row['batching']:10}{row['workers']:>8}{row['position']:>10.0%}"
            f"{row['seek_s']:>9.3f}{row['first_s']:>9.3f}{row['total_s']:>9.3f}"
        )
    slowest = max(row["first_s"] for row in rows)
    print(f"slowest first batch after the workers started: {slowest:.3f} s, target {_TARGET_S} s")
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("images", "audio_clips", "texts")}
        content = {
            "rows": rows,
            "slowest_first_s": slowest,
            "is_within_target": slowest <= _TARGET_S,
        }
        content |= {**settings, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_cases(root: Path, arguments: argparse.Namespace) -> dict[str, Case]:
    """One corpus per kind of batching; caches the token ids of the texts, as a first run does."""
    corpora: tuple[tuple[str, Task, Iterator[Sample]], ...] = (
        ("fixed", "image-caption", images(arguments.images, (500, 375), 92, 100)),
        ("bucket", "speech", audio_clips(arguments.audio_clips, 16000, 64)),
        ("pack", "text", texts(arguments.texts)),
    )
    manifests = {
        mode: write_dataset(root / mode, task, samples, shard_samples=1000)
        for mode, task, samples in corpora
    }
    tokenizer = train_tokenizer([root / "pack"], 1024, root / "tokenizer.model")
    text_view = TextView(tokenizer, seq_len=1024)
    text_view.lengths(Source([manifests["pack"]], "train"))
    return {
        "fixed": Case(
            manifests["fixed"],
            ImageTextView(tokenizer, 224, 64, None),
            Batching("fixed", 64 * _MICRO_BATCHES_PER_STEP, 64),
        ),
        "bucket": Case(
            manifests["bucket"],
            SpeechView(CtcUnits(tokenizer, None), False),
            Batching("bucket", _MICRO_BATCHES_PER_STEP * 100 * 100, 100 * 100),
        ),
        "pack": Case(
            manifests["pack"],
            text_view,
            Batching("pack", 4 * _MICRO_BATCHES_PER_STEP, 4, seq_len=1024),
        ),
    }


def measure(cases: dict[str, Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds for each kind of batching, number of workers, and position."""
    rows = [
        (mode, num_workers, position)
        for mode in cases
        for num_workers in map(int, arguments.workers.split(","))
        for position in _POSITIONS
    ]
    times_of: dict[tuple[str, int, float], list[dict[str, float]]] = {row: [] for row in rows}
    for _ in range(arguments.rounds):
        for row in rows:
            mode, num_workers, position = row
            times_of[row].append(resume(cases[mode], num_workers, position))
    return [
        {
            "batching": mode,
            "workers": num_workers,
            "position": position,
            **{
                name: round(statistics.median(times[name] for times in times_of[row]), 4)
                for name in ("seek_s", "first_s", "total_s")
            },
            "all_first_s": [round(times["first_s"], 4) for times in times_of[row]],
        }
        for row in rows
        for mode, num_workers, position in [row]
    ]


def resume(case: Case, num_workers: int, position: float) -> dict[str, float]:
    """Open the corpus and load one batch at a relative position in the first epoch."""
    source = Source([case.manifest], "train")

    def new_plan() -> Plan:
        return Plan(case.view.lengths(source), case.batching, seed=0)

    step = int(position * new_plan().num_steps(1))
    start = time.perf_counter()
    next(new_plan().rank_batches(step, 0, 1))
    seek_s = time.perf_counter() - start
    loader = Loader(
        StampedDataset(source, case.view), new_plan().rank_batches(step, 0, 1), num_workers
    )
    requested_s = time.perf_counter()
    batch = next(iter(loader))
    done_s = time.perf_counter()
    started_s = float(batch["started_s"]) if num_workers else requested_s
    return {"seek_s": seek_s, "first_s": done_s - started_s, "total_s": done_s - requested_s}


if __name__ == "__main__":
    main()
