"""Preview a mix of corpora before training: shares, epochs, hours, and characters.

The totals of the manifests suffice. Characters stand in for tokens, which depend on the tokenizer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.datasets import find_manifests
from muomni.config.run import MixSection
from muomni.data.sampling.mix import CYCLE, cycle_quotas, draw_shares
from muomni.data.shards.exclusion_mask import read_exclusion
from muomni.data.shards.manifest import Manifest, Task, find_datasets
from muomni.errors import DataError
from muomni.io.table import format_table

_SPLIT = "train"
_MS_PER_HOUR = 3_600_000


@dataclass(frozen=True, slots=True)
class MixRow:
    """One corpus of a mix; `hours` and `num_chars` are expected values for the drawn samples."""

    name: str
    num_samples: int
    share: float
    num_draws: int
    epochs: float
    hours: float
    num_chars: int


def select_datasets(folder: Path, task: Task | None) -> list[Manifest]:
    """The datasets of a task in a folder; without a task, all of them.

    Raises `DataError` if no task is given and the datasets differ in theirs.
    """
    if task is not None:
        return find_datasets(folder, task)
    found = find_manifests([folder])
    tasks = sorted({manifest.task for manifest in found})
    if len(tasks) > 1:
        raise DataError(
            f"{folder} contains datasets for {', '.join(tasks)}; choose one with --task"
        )
    return found


def mix_rows(manifests: list[Manifest], mix: MixSection, num_draws: int | None) -> list[MixRow]:
    """One row per corpus with training samples; `num_draws` defaults to the number of all samples.

    Raises `ConfigError` if the weights do not match the corpora.
    """
    found = [manifest for manifest in manifests if _SPLIT in manifest.splits]
    totals = [manifest.split(_SPLIT).totals for manifest in found]
    kept = [
        total.num_samples - len(read_exclusion(manifest, _SPLIT).ids)
        for manifest, total in zip(found, totals, strict=True)
    ]
    # Length is duration for corpora with audio, else characters.
    lengths = [total.duration_ms or total.num_chars for total in totals]
    means = [
        length / total.num_samples if length else 1.0
        for length, total in zip(lengths, totals, strict=True)
    ]
    shares = draw_shares(mix, [manifest.name for manifest in found], kept, means)
    is_drawn = np.array(shares) > 0
    exact = np.zeros(len(shares))
    exact[is_drawn] = cycle_quotas([share for share in shares if share > 0])
    draws = np.round(exact / CYCLE * (num_draws or sum(kept))).astype(int).tolist()
    return [
        MixRow(
            name=manifest.name,
            num_samples=num,
            share=float(quota / CYCLE),
            num_draws=drawn,
            epochs=drawn / num if num else 0.0,
            hours=drawn * total.duration_ms / max(1, total.num_samples) / _MS_PER_HOUR,
            num_chars=round(drawn * total.num_chars / max(1, total.num_samples)),
        )
        for manifest, num, total, quota, drawn in zip(
            found, kept, totals, exact, draws, strict=True
        )
    ]


def mix_table(rows: list[MixRow]) -> str:
    """The rows as an aligned table."""
    headers = ("corpus", "samples", "share", "drawn", "epochs", "hours", "characters")
    cells = [
        (
            row.name,
            f"{row.num_samples:,}",
            f"{row.share:.4f}",
            f"{row.num_draws:,}",
            f"{row.epochs:.2f}",
            f"{row.hours:,.1f}",
            f"{row.num_chars:,}",
        )
        for row in rows
    ]
    return format_table(headers, cells, align="<>>>>>>")
