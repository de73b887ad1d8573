"""Samples that repeat others, and training samples that tests would meet again, as exclude masks.

Of samples that are the same the first in training order stays. A training sample that is the same as
one of `val` or `test` is left out (leakage). Datasets of one task are compared with each other; the same
audio clip in a dataset for speech and in one for tts serves two purposes. No shard is written anew.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_prep.curation.exclude import Mask, remove_mask, write_mask
from data_prep.curation.near_duplicates import (
    NUM_MINIMA,
    alike_images,
    alike_texts,
    bit_distance,
    look_of,
    plain_words,
    signature_of,
    similarity,
)
from data_prep.datasets import by_shard
from data_prep.inspection.measurements import media_of
from data_prep.sharding.shard_pool import map_shards
from data_prep.train_tokenizer import sample_texts
from muomni.data.media.decode import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.shards.exclusion_mask import FOLDER
from muomni.data.shards.manifest import Manifest, hash64
from muomni.data.shards.reader import SplitReader
from muomni.errors import ConfigError, DataError
from muomni.io.atomic_write import write_atomic

REPEATS = "dedup-repeats"
LEAKAGE = "dedup-leakage"
REPORT = "dedup.report.jsonl"
# The image or audio clip alone decides about leakage: another caption does not make it unseen.
_MEDIA_TASKS = ("image-caption", "speech", "tts")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What counts as the same beside equal content.

    `reads_text`: the same words and media; `is_near`: images whose hashes differ in at most
    `max_distance` of 64 bits, and texts of at least `min_similarity`. Raises `ConfigError`.
    """

    reads_text: bool = True
    is_near: bool = False
    max_distance: int = 4
    min_similarity: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 16:
            raise ConfigError(f"--max-distance {self.max_distance} lies outside 0 to 16 bits")
        if not 0.5 <= self.min_similarity <= 1:
            raise ConfigError(f"--min-similarity {self.min_similarity:g} lies outside 0.5 to 1")
        if self.is_near and not self.reads_text:
            raise ConfigError("--near has to read the samples; leave out --content-only")


@dataclass(frozen=True, slots=True)
class Traits:
    """What samples are compared by, a row a sample; 0 where a sample has no such trait.

    `content`, `words` (with the media) and `media` are hashes, uint64 [N]; `look` and `thumbnail` are
    those of the image; `signature` is that of the text, uint32 [N, NUM_MINIMA].
    """

    content: np.ndarray
    words: np.ndarray
    media: np.ndarray
    has_look: np.ndarray
    look: np.ndarray
    thumbnail: np.ndarray
    has_signature: np.ndarray
    signature: np.ndarray

    @classmethod
    def joined(cls, parts: list["Traits"]) -> "Traits":
        """The rows of all parts, one after the other."""
        names = cls.__slots__
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


@dataclass(frozen=True, slots=True)
class _Part:
    """One split of one dataset, and the row of its first sample."""

    manifest: Manifest
    split: str
    start: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found in one dataset: ids of train that repeat others, and that leak."""

    manifest: Manifest
    num_train: int
    repeats: np.ndarray
    leakage: np.ndarray
    lines: tuple[dict[str, object], ...]


def find_duplicates(
    manifests: list[Manifest], comparison: Comparison, num_workers: int
) -> list[Outcome]:
    """Compare all samples of the datasets, task by task; nothing is written.

    Raises `DataError` for a dataset that is named twice or cannot be read.
    """
    if len({manifest.root.resolve() for manifest in manifests}) < len(manifests):
        raise DataError("a dataset is named twice; its samples would all repeat each other")
    outcomes = []
    for task in dict.fromkeys(manifest.task for manifest in manifests):
        own = [manifest for manifest in manifests if manifest.task == task]
        outcomes += _of_one_task(own, comparison, num_workers)
    return outcomes


def write_masks(outcome: Outcome) -> list[Mask]:
    """Write the masks of a dataset and its report, replacing those of an earlier search."""
    manifest = outcome.manifest
    masks = []
    for name, ids, reason in (
        (REPEATS, outcome.repeats, "repeats an earlier sample"),
        (LEAKAGE, outcome.leakage, "the same as a sample of val or test"),
    ):
        if len(ids):
            masks.append(write_mask(manifest, name, "train", ids, reason))
        else:
            remove_mask(manifest.root, name)
    report = manifest.root / FOLDER / REPORT
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in outcome.lines)
    if lines:
        write_atomic(report, lines.encode())
    else:
        report.unlink(missing_ok=True)
    return masks


def _of_one_task(
    manifests: list[Manifest], comparison: Comparison, num_workers: int
) -> list[Outcome]:
    parts: list[_Part] = []
    for manifest in manifests:
        for name, split in manifest.splits.items():
            start = parts[-1].start + parts[-1].num_samples if parts else 0
            parts.append(_Part(manifest, name, start, split.num_samples))
    traits = _traits(manifests, comparison, num_workers)
    is_train = np.concatenate([np.full(part.num_samples, part.split == "train") for part in parts])
    same = _same(traits, comparison)
    groups = _groups(len(is_train), same)
    leak_groups = groups
    if manifests[0].task in _MEDIA_TASKS:
        leak_groups = _groups(len(is_train), np.concatenate([same, _equal(traits.media)]))
    held_out = _first_of_groups(leak_groups, ~is_train)
    leaks = is_train & (held_out >= 0)
    first = _first_of_groups(groups, is_train & ~leaks)
    repeats = is_train & ~leaks & (first != np.arange(len(groups)))
    like = np.where(leaks, held_out, first)
    describe = _describer(parts)
    outcomes = []
    for part in parts:
        if part.split != "train":
            continue
        rows = slice(part.start, part.start + part.num_samples)
        chosen = np.flatnonzero(leaks[rows] | repeats[rows]) + part.start
        lines = [
            {
                "mask": LEAKAGE if leaks[row] else REPEATS,
                **describe(row, with_place=False),
                "like": describe(int(like[row]), with_place=True),
                **_how(traits, row, int(like[row])),
            }
            for row in map(int, chosen)
        ]
        outcomes.append(
            Outcome(
                part.manifest,
                part.num_samples,
                np.flatnonzero(repeats[rows]),
                np.flatnonzero(leaks[rows]),
                tuple(lines),
            )
        )
    return outcomes


def _traits(manifests: list[Manifest], comparison: Comparison, num_workers: int) -> Traits:
    shards = [shard for manifest in manifests for shard in by_shard(manifest)]
    return Traits.joined(map_shards(partial(_shard_traits, comparison), shards, num_workers))


def _shard_traits(comparison: Comparison, manifest: Manifest) -> Traits:
    """The traits of a dataset of one shard."""
    ((split, _),) = manifest.splits.items()
    reader = SplitReader(manifest, split)
    num_samples = len(reader)
    # Without a comparison by sight or signature their columns are empty.
    width = NUM_MINIMA if comparison.is_near else 0
    traits = Traits(
        content=reader.columns["content_hash"].astype(np.uint64),
        words=np.zeros(num_samples, np.uint64),
        media=np.zeros(num_samples, np.uint64),
        has_look=np.zeros(num_samples, bool),
        look=np.zeros(num_samples, np.uint64),
        thumbnail=np.zeros((num_samples, 192 if comparison.is_near else 0), np.uint8),
        has_signature=np.zeros(num_samples, bool),
        signature=np.zeros((num_samples, width), np.uint32),
    )
    if comparison.reads_text:
        for row in range(num_samples):
            _read_traits(traits, row, reader.read(row), manifest, comparison)
    return traits


def _read_traits(
    traits: Traits,
    row: int,
    sample: dict[str, bytes | str],
    manifest: Manifest,
    comparison: Comparison,
) -> None:
    images = media_of(sample, IMAGE_EXTENSIONS)
    media = images + media_of(sample, AUDIO_EXTENSIONS)
    try:
        words = [plain_words(text) for text in sample_texts(sample, manifest.task)]
    except (ValueError, KeyError, TypeError):
        # A sample without text that can be understood, as adopted tars have: its content counts.
        return
    digest = b"".join(hash64(data).to_bytes(8, "little") for _, data in media)
    traits.media[row] = hash64(digest) if media else 0
    # Without words, as in digits of a script or mere signs, nothing can be said of the text.
    if any(words):
        traits.words[row] = hash64(digest + b"\0" + "\n".join(words).encode())
    if not comparison.is_near:
        return
    if manifest.task == "image-caption" and images:
        try:
            look = look_of(images[0][1])
        except DataError:
            return  # a broken image of an adopted tar resembles none
        if look is not None:
            traits.has_look[row] = True
            traits.look[row], traits.thumbnail[row] = look
    elif not media:
        signature = signature_of(" ".join(words))
        if signature is not None:
            traits.has_signature[row] = True
            traits.signature[row] = signature


def _same(traits: Traits, comparison: Comparison) -> np.ndarray:
    """Pairs [num_pairs, 2] of samples that count as the same."""
    pairs = [_equal(traits.content), _equal(traits.words)]
    if comparison.is_near:
        rows = np.flatnonzero(traits.has_look)
        found = alike_images(traits.look[rows], traits.thumbnail[rows], comparison.max_distance)
        pairs.append(rows[found])
        rows = np.flatnonzero(traits.has_signature)
        found = alike_texts(traits.signature[rows], comparison.min_similarity)
        pairs.append(rows[found])
    return np.concatenate(pairs)


def _equal(hashes: np.ndarray) -> np.ndarray:
    """Pairs that link all samples of one hash; 0 is none."""
    rows = np.flatnonzero(hashes)
    order = rows[np.argsort(hashes[rows], kind="stable")]
    same = hashes[order[1:]] == hashes[order[:-1]]
    return np.column_stack([order[:-1][same], order[1:][same]])


def _groups(num_samples: int, pairs: np.ndarray) -> np.ndarray:
    """The first sample of each sample's group, int64 [num_samples]; pairs join groups."""
    labels = np.arange(num_samples)
    one, other = pairs[:, 0], pairs[:, 1]
    while True:
        lower = np.minimum(labels[one], labels[other])
        if (labels[one] == lower).all() and (labels[other] == lower).all():
            return labels
        # Roots take the lower label, then all follow their root: few rounds, also for long chains.
        np.minimum.at(labels, labels[one], lower)
        np.minimum.at(labels, labels[other], lower)
        while (labels != labels[labels]).any():
            labels = labels[labels]


def _first_of_groups(groups: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """For each sample the first chosen one of its group, -1 where there is none."""
    rows = np.flatnonzero(chosen)
    first = np.full(len(groups), len(groups))
    np.minimum.at(first, groups[rows], rows)
    found = first[groups]
    return np.where(found == len(groups), -1, found)


def _describer(parts: list[_Part]) -> Callable[..., dict[str, object]]:
    readers = {part.start: SplitReader(part.manifest, part.split) for part in parts}

    def describe(row: int, with_place: bool) -> dict[str, object]:
        part = next(part for part in reversed(parts) if part.start <= row)
        key = readers[part.start].read(row - part.start)["__key__"]
        entry: dict[str, object] = {"id": row - part.start, "key": key}
        place = {"dataset": part.manifest.name, "split": part.split}
        return {**place, **entry} if with_place else entry

    return describe


def _how(traits: Traits, row: int, like: int) -> dict[str, object]:
    """By what a sample is the same as another; `chain` when only by those between them."""
    for name in ("content", "words", "media"):
        value = getattr(traits, name)
        if value[row] and value[row] == value[like]:
            return {"by": name}
    if traits.has_look[row] and traits.has_look[like]:
        return {"by": "look", "bits": int(bit_distance(traits.look[row], traits.look[like])[0])}
    if traits.has_signature[row] and traits.has_signature[like]:
        share = similarity(traits.signature[row : row + 1], traits.signature[like : like + 1])
        return {"by": "signature", "similarity": round(float(share[0]), 3)}
    return {"by": "chain"}
