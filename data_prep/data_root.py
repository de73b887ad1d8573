"""What a data root holds: samples, hours, characters and tokens of each dataset, and its share."""

from pathlib import Path

import numpy as np

from data_prep.train_tokenizer import sample_texts
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.text.tokenizer import Tokenizer

TOKENIZER_NAME = "tokenizer.model"
# Texts from which tokens a character are guessed.
_NUM_PROBED = 200


def data_root_table(manifests: list[Manifest], root: Path) -> str:
    """A line a dataset on its train split, tasks together; a sum for each task of several datasets.

    Tokens are guessed from some texts, where `root` holds a tokenizer. Shares are those of the samples
    and hours of a task.
    """
    path = root / TOKENIZER_NAME
    tokenizer = Tokenizer.load(path) if path.is_file() else None
    rows = [("task", "dataset", "samples", "share", "hours", "share", "images", "chars", "tokens")]
    for task in dict.fromkeys(manifest.task for manifest in manifests):
        own = [manifest for manifest in manifests if manifest.task == task]
        metrics = np.array([_metrics(manifest, tokenizer) for manifest in own])
        rows += [
            _row(task, manifest.name, row, metrics)
            for manifest, row in zip(own, metrics, strict=True)
        ]
        if len(own) > 1:
            rows.append(_row(task, "(all)", metrics.sum(axis=0), metrics))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    note = "tokens are guessed" if tokenizer else f"no {TOKENIZER_NAME} there, so no tokens"
    return "\n".join([f"train splits of {root} ({note})", *lines])


def _metrics(manifest: Manifest, tokenizer: Tokenizer | None) -> list[float]:
    """Samples, hours, images, characters, tokens of the train split."""
    if "train" not in manifest.splits:
        return [0.0] * 5
    totals = manifest.split("train").totals
    tokens = totals.num_chars * _tokens_per_char(manifest, tokenizer) if tokenizer else 0.0
    hours = totals.duration_ms / 3.6e6
    return [totals.num_samples, hours, totals.num_images, totals.num_chars, tokens]


def _tokens_per_char(manifest: Manifest, tokenizer: Tokenizer) -> float:
    reader = SplitReader(manifest, "train")
    num_chars = num_tokens = 0
    for index in np.linspace(0, len(reader) - 1, min(_NUM_PROBED, len(reader))).astype(int):
        for text in sample_texts(reader.read(int(index)), manifest.task):
            num_chars += len(text)
            num_tokens += len(tokenizer.encode(text))
    return num_tokens / max(1, num_chars)


def _row(task: str, name: str, row: np.ndarray, metrics: np.ndarray) -> tuple[str, ...]:
    samples, hours, images, chars, tokens = row
    all_samples, all_hours = metrics[:, 0].sum(), metrics[:, 1].sum()
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
