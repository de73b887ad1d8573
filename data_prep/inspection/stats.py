"""Statistics of datasets, from their columns and, for token counts, a few of their texts."""

from pathlib import Path

import numpy as np

from data_prep.filters import split_dropped
from data_prep.members import sample_texts
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.text.tokenizer import Tokenizer
from muomni.io.table import format_table

TOKENIZER_NAME = "tokenizer.model"
_PERCENTILES = (0, 5, 50, 95, 100)
# Texts per dataset from which the tokens per character are estimated.
_NUM_PROBED = 200
_MS_PER_HOUR = 3.6e6


def split_stats(manifest: Manifest) -> dict[str, dict[str, object]]:
    """Totals and percentiles of each split, ready for JSON.

    The percentiles (minimum, 5, 50, 95, maximum) cover characters and, for samples with audio, seconds.
    """
    stats: dict[str, dict[str, object]] = {}
    for name, split in manifest.splits.items():
        columns = SplitReader(manifest, name).columns
        row: dict[str, object] = split.totals.model_dump()
        row["num_shards"] = len(split.shards)
        row["num_groups"] = len(np.unique(columns["group_hash"]))
        row["num_repeated"] = len(columns) - len(np.unique(columns["content_hash"]))
        row["chars_percentiles"] = _percentiles(columns["num_chars"])
        durations = columns["duration_ms"][columns["num_audios"] > 0] / 1000
        if len(durations):
            row["duration_s_percentiles"] = _percentiles(durations)
        stats[name] = row
    return stats


def dataset_table(manifest: Manifest) -> str:
    """A table with one line per split, followed by the counts of dropped samples."""
    headers = [
        "split",
        "samples",
        "groups",
        "shards",
        "minutes",
        "images",
        "chars",
        "chars/sample",
        "seconds/sample",
    ]
    rows = [
        (
            name,
            f"{row['num_samples']:,}",
            f"{row['num_groups']:,}",
            row["num_shards"],
            f"{float(str(row['duration_ms'])) / 60_000:,.1f}",
            f"{row['num_images']:,}",
            f"{row['num_chars']:,}",
            _spread(row["chars_percentiles"]),
            _spread(row.get("duration_s_percentiles")),
        )
        for name, row in split_stats(manifest).items()
    ]
    bad, filtered = split_dropped(manifest.dropped)
    lines = [
        f"{manifest.name} ({manifest.task}, {manifest.root})",
        format_table(headers, rows, align="<" + ">" * 8),
        f"bad: {_counts(bad)}",
    ]
    if manifest.filters or filtered:
        lines.append(f"filtered: {_counts(filtered)}")
    if manifest.changed:
        lines.append(f"changed: {_counts(manifest.changed)}")
    if manifest.overlap:
        lines.append(f"groups also in train: {_counts(manifest.overlap)} samples")
    return "\n".join(lines)


def data_root_table(manifests: list[Manifest], root: Path) -> str:
    """A table of the train splits in a data root, with a total for tasks of several datasets.

    Shares are of the samples and hours of a task. Tokens are estimated if `root` has a tokenizer.
    """
    path = root / TOKENIZER_NAME
    tokenizer = Tokenizer.load(path) if path.is_file() else None
    headers = ["task", "dataset", "samples", "share", "hours", "share", "images", "chars", "tokens"]
    rows = []
    for task in dict.fromkeys(manifest.task for manifest in manifests):
        own = [manifest for manifest in manifests if manifest.task == task]
        totals = np.array([_train_totals(manifest, tokenizer) for manifest in own])
        rows += [
            _data_root_row(task, manifest.name, row, totals)
            for manifest, row in zip(own, totals, strict=True)
        ]
        if len(own) > 1:
            rows.append(_data_root_row(task, "(all)", totals.sum(axis=0), totals))
    note = "estimated tokens" if tokenizer else f"no {TOKENIZER_NAME}, hence no token counts"
    table = format_table(headers, rows, align="<<" + ">" * 7)
    return f"train splits of {root} ({note})\n{table}"


def _train_totals(manifest: Manifest, tokenizer: Tokenizer | None) -> list[float]:
    """Samples, hours, images, characters, and tokens of the train split."""
    if "train" not in manifest.splits:
        return [0.0] * 5
    totals = manifest.split("train").totals
    tokens = totals.num_chars * _tokens_per_char(manifest, tokenizer) if tokenizer else 0.0
    hours = totals.duration_ms / _MS_PER_HOUR
    return [totals.num_samples, hours, totals.num_images, totals.num_chars, tokens]


def _tokens_per_char(manifest: Manifest, tokenizer: Tokenizer) -> float:
    reader = SplitReader(manifest, "train")
    num_chars = num_tokens = 0
    for index in np.linspace(0, len(reader) - 1, min(_NUM_PROBED, len(reader))).astype(int):
        for text in sample_texts(reader.read(int(index)), manifest.task):
            num_chars += len(text)
            num_tokens += len(tokenizer.encode(text))
    return num_tokens / max(1, num_chars)


def _data_root_row(task: str, name: str, row: np.ndarray, totals: np.ndarray) -> tuple[str, ...]:
    samples, hours, images, chars, tokens = row
    all_samples, all_hours = totals[:, 0].sum(), totals[:, 1].sum()
    return (
        task,
        name,
        f"{samples:,.0f}",
        f"{samples / max(1, all_samples):.1%}",
        f"{hours:,.3f}",
        f"{hours / all_hours:.1%}" if all_hours else "-",
        f"{images:,.0f}",
        f"{chars:,.0f}",
        f"{tokens:,.0f}" if tokens else "-",
    )


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "none"


def _percentiles(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in np.percentile(values, _PERCENTILES)]


def _spread(percentiles: object) -> str:
    """Minimum, median, and maximum."""
    if not isinstance(percentiles, list):
        return "-"
    return f"{percentiles[0]:g}..{percentiles[2]:g}..{percentiles[-1]:g}"
