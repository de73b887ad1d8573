"""Metrics of a dataset from its columns: no tar is opened."""

import numpy as np

from data_prep.filters import bad_and_filtered
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader

_PERCENTILES = (0, 5, 50, 95, 100)


def split_stats(manifest: Manifest) -> dict[str, dict[str, object]]:
    """Totals and percentiles of each split, ready for JSON.

    Percentiles (minimum, 5, 50, 95, maximum) are given for characters, and for seconds of audio
    where there is any.
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


def table(manifest: Manifest, stats: dict[str, dict[str, object]]) -> str:
    """The metrics as text: a line a split, then what was left out."""
    head: tuple[str, ...] = (
        "split",
        "samples",
        "groups",
        "shards",
        "minutes",
        "images",
        "chars",
        "chars a sample",
        "seconds a sample",
    )
    rows: list[tuple[str, ...]] = [head]
    for name, row in stats.items():
        minutes = float(str(row["duration_ms"])) / 60_000
        rows.append(
            (
                name,
                f"{row['num_samples']:,}",
                f"{row['num_groups']:,}",
                str(row["num_shards"]),
                f"{minutes:,.1f}",
                f"{row['num_images']:,}",
                f"{row['num_chars']:,}",
                _spread(row["chars_percentiles"]),
                _spread(row.get("duration_s_percentiles")),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    bad, filtered = bad_and_filtered(manifest.dropped)
    title = f"{manifest.name} ({manifest.task}, {manifest.root})"
    lines = [title, *lines, f"left out: {_counts(bad)}"]
    if manifest.filters:
        lines.append(f"filtered: {_counts(filtered)}")
    return "\n".join(lines)


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "nothing"


def _percentiles(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in np.percentile(values, _PERCENTILES)]


def _spread(percentiles: object) -> str:
    """Minimum, median and maximum."""
    if not isinstance(percentiles, list):
        return "-"
    return f"{percentiles[0]:g}..{percentiles[2]:g}..{percentiles[-1]:g}"
