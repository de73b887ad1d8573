"""Statistics of a part of the samples of datasets: scripts, speakers, levels, rates, and sizes."""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from data_prep.filters import clipped_fraction, silence_fraction
from data_prep.members import Sample, media_of, sample_texts
from muomni.data.media.decode import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    image_size,
    read_audio,
)
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.errors import DataError
from muomni.io.count_progress import counted
from muomni.io.table import format_table

_NUM_SHOWN_SPEAKERS = 20
_PERCENTILES = (0, 5, 50, 95, 100)
# First words of Unicode names that are not the name of a script.
_SCRIPT_NAMES = {"CJK": "han", "IDEOGRAPHIC": "han", "KATAKANA-HIRAGANA": "katakana"}


@dataclass(slots=True)
class _Counts:
    """What was found in the samples that were read."""

    num_bad: int = 0
    letters: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)
    speaker_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rates_hz: Counter[int] = field(default_factory=Counter)
    clipped: list[float] = field(default_factory=list)
    silent: list[float] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)


def content_stats(manifest: Manifest, split: str, num_samples: int) -> dict[str, object]:
    """Statistics of up to `num_samples` samples that are evenly spaced over a split, ready for JSON.

    Scripts are fractions of all letters. Percentiles (minimum, 5, 50, 95, maximum) cover the fractions of
    clipped audio samples and of silent frames, and image sides in pixels. Samples that do not decode are
    counted.
    """
    reader = SplitReader(manifest, split)
    num_read = min(num_samples, len(reader))
    counts = _Counts()
    chosen = np.linspace(0, len(reader) - 1, num_read).round().astype(int).tolist()
    for index in counted(chosen, num_read, f"{manifest.name} {split} (content)"):
        try:
            _add(counts, reader.read(index), manifest.task)
        except (DataError, ValueError, KeyError, TypeError):
            counts.num_bad += 1
    percentiles = {
        "clipped_fraction_percentiles": counts.clipped,
        "silence_fraction_percentiles": counts.silent,
        "width_percentiles": counts.widths,
        "height_percentiles": counts.heights,
    }
    num_letters = max(1, counts.letters.total())
    return {
        "num_read": num_read,
        "num_undecodable": counts.num_bad,
        "scripts": {
            name: round(count / num_letters, 4) for name, count in counts.letters.most_common()
        },
        "languages": dict(counts.languages.most_common()),
        "speakers": {
            name: {"samples": count, "seconds": round(counts.speaker_s[name], 3)}
            for name, count in counts.speakers.most_common()
        },
        "sample_rates_hz": {str(rate): count for rate, count in counts.rates_hz.most_common()},
        **{name: _percentiles(values) for name, values in percentiles.items() if values},
    }


def content_lines(split: str, stats: Mapping[str, object]) -> list[str]:
    """The statistics of a split as lines of text."""
    lines = [f"{split}: {stats['num_read']:,} samples read"]
    lines[0] += f", {stats['num_undecodable']:,} do not decode" if stats["num_undecodable"] else ""
    for name in ("scripts", "languages", "sample_rates_hz"):
        values = stats[name]
        if isinstance(values, dict) and values:
            shown = (
                f"{key} {value:.1%}" if name == "scripts" else f"{key} {value:,}"
                for key, value in values.items()
            )
            lines.append(f"  {name.replace('_', ' ')}: {', '.join(shown)}")
    lines += _speaker_lines(stats["speakers"])
    for name, values in stats.items():
        if name.endswith("_percentiles") and isinstance(values, list):
            what = name.removesuffix("_percentiles").replace("_", " ")
            lines.append(f"  {what}: {' .. '.join(f'{value:g}' for value in values)}")
    return lines


@lru_cache(maxsize=1 << 16)
def script_of(letter: str) -> str:
    """The Unicode script of a letter, by its name."""
    name = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    first = name.partition(" ")[0] or "unnamed"
    return _SCRIPT_NAMES.get(first, first.lower())


def _add(counts: _Counts, sample: Sample, task: str) -> None:
    for text in sample_texts(sample, task):
        counts.letters.update(script_of(letter) for letter in text if letter.isalpha())
    body = json.loads(sample["json"]) if "json" in sample else {}
    for name, found in (("language", counts.languages), ("speaker", counts.speakers)):
        if body.get(name):
            found[str(body[name])] += 1
    for _, data in media_of(sample, IMAGE_EXTENSIONS):
        width, height = image_size(data)
        counts.widths.append(width)
        counts.heights.append(height)
    for _, data in media_of(sample, AUDIO_EXTENSIONS):
        samples, rate_hz = read_audio(data)
        counts.rates_hz[rate_hz] += 1
        if body.get("speaker"):
            counts.speaker_s[str(body["speaker"])] += len(samples) / rate_hz
        counts.clipped.append(clipped_fraction(samples))
        counts.silent.append(silence_fraction(samples, rate_hz))


def _speaker_lines(speakers: object) -> list[str]:
    """A table of the speakers with most samples."""
    if not isinstance(speakers, dict) or not speakers:
        return []
    rows = [
        (name, f"{about['samples']:,}", f"{about['seconds'] / 60:.1f}")
        for name, about in list(speakers.items())[:_NUM_SHOWN_SPEAKERS]
    ]
    table = format_table(("speaker", "samples", "minutes"), rows, align="<>>")
    title = f"{len(speakers):,} speakers" if len(speakers) > 1 else "1 speaker"
    if len(speakers) > len(rows):
        title += f", of which {len(rows)} are shown"
    return [f"  {title}", *(f"    {line}" for line in table.splitlines())]


def _percentiles(values: list[int] | list[float]) -> list[float]:
    return [round(float(value), 4) for value in np.percentile(values, _PERCENTILES)]
