"""What a mix of corpora comes to, before anything is trained: shares, epochs, hours, characters.

Works from the totals of the manifests; characters stand for tokens, which depend on the tokenizer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.datasets import find_manifests
from muomni.config.run import MixSection
from muomni.data.sampling.mix import CYCLE, cycle_quotas, sampling_shares
from muomni.data.shards.exclusion_mask import read_exclusion
from muomni.data.shards.manifest import Manifest, Task, find_datasets
from muomni.errors import DataError

_SPLIT = "train"
_MS_AN_HOUR = 3_600_000


@dataclass(frozen=True, slots=True)
class MixRow:
    """One corpus of a mix. `hours` and `num_chars` are of what is drawn, by the corpus's means."""

    name: str
    num_samples: int
    share: float
    num_draws: int
    epochs: float
    hours: float
    num_chars: int


def datasets_of(folder: Path, task: Task | None) -> list[Manifest]:
    """The datasets of a task in a folder; without one, all there are, which must share a task.

    Raises DataError.
    """
    if task is not None:
        return find_datasets(folder, task)
    found = find_manifests([folder])
    tasks = sorted({manifest.task for manifest in found})
    if len(tasks) > 1:
        raise DataError(f"{folder} holds datasets of {', '.join(tasks)}; say --task")
    return found


def mix_rows(manifests: list[Manifest], mix: MixSection, num_draws: int | None) -> list[MixRow]:
    """A row for each corpus with training samples; `num_draws` is by default the sum of all samples.

    Raises ConfigError for weights that do not fit the corpora.
    """
    found = [manifest for manifest in manifests if _SPLIT in manifest.splits]
    totals = [manifest.split(_SPLIT).totals for manifest in found]
    kept = [
        total.num_samples - len(read_exclusion(manifest, _SPLIT).ids)
        for manifest, total in zip(found, totals, strict=True)
    ]
    # Sound is measured in time, everything else in text.
    lengths = [total.duration_ms or total.num_chars for total in totals]
    means = [
        length / total.num_samples if length else 1.0
        for length, total in zip(lengths, totals, strict=True)
    ]
    shares = sampling_shares(mix, [manifest.name for manifest in found], kept, means)
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
            hours=drawn * total.duration_ms / max(1, total.num_samples) / _MS_AN_HOUR,
            num_chars=round(drawn * total.num_chars / max(1, total.num_samples)),
        )
        for manifest, num, total, quota, drawn in zip(
            found, kept, totals, exact, draws, strict=True
        )
    ]


def mix_table(rows: list[MixRow]) -> str:
    """The rows as text."""
    width = max(6, *(len(row.name) for row in rows))
    head = f"{'corpus':{width}}{'samples':>15}{'share':>9}{'drawn':>15}{'epochs':>10}"
    lines = [f"{head}{'hours':>12}{'characters':>18}"]
    lines += [
        f"{row.name:{width}}{row.num_samples:>15,}{row.share:>9.4f}{row.num_draws:>15,}"
        f"{row.epochs:>10.2f}{row.hours:>12,.1f}{row.num_chars:>18,}"
        for row in rows
    ]
    return "\n".join(lines)
