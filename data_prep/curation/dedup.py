"""Find duplicates, and training samples that occur in val or test, and write them as exclusion masks.

Of duplicates, the first in training order is kept. Training samples that duplicate one of `val` or `test`
(leakage) are masked. Datasets are compared within a task, since an audio clip may serve both speech and
tts. Shards are not rewritten.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_prep.curation.exclude import Mask, remove_mask, write_mask
from data_prep.curation.near_duplicates import (
    NUM_HASHES,
    bit_distance,
    equal_neighbors,
    image_signature,
    near_duplicate_images,
    near_duplicate_texts,
    plain_words,
    similarity,
    text_signature,
)
from data_prep.datasets import by_shard, map_shards
from data_prep.members import media_of, sample_texts
from data_prep.options import Comparison
from muomni.data.media.formats import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.shards.exclusion_mask import FOLDER
from muomni.data.shards.manifest import Manifest, hash64
from muomni.data.shards.reader import SplitReader
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

REPEATS = "dedup-repeats"
LEAKAGE = "dedup-leakage"
REPORT = "dedup.report.jsonl"
# Leakage depends on the image or audio clip alone: it is not unseen with another caption.
_MEDIA_TASKS = ("image-caption", "speech", "tts")


@dataclass(frozen=True, slots=True)
class Traits:
    """Features by which samples are compared, one row per sample; 0 if a sample lacks one.

    `content`, `words` (with the media), and `media` are hashes, uint64 [N]. `image_hash` and `thumbnail`
    belong to the image, and `signature`, uint32 [N, NUM_HASHES], to the text.
    """

    content: np.ndarray
    words: np.ndarray
    media: np.ndarray
    has_image_hash: np.ndarray
    image_hash: np.ndarray
    thumbnail: np.ndarray
    has_signature: np.ndarray
    signature: np.ndarray

    @classmethod
    def joined(cls, parts: list["Traits"]) -> "Traits":
        """Concatenate the rows of all parts."""
        names = cls.__slots__
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


@dataclass(frozen=True, slots=True)
class _Part:
    """A split of a dataset, and the row of its first sample."""

    manifest: Manifest
    split: str
    start: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Findings in one dataset: ids of training samples that repeat others, and that leak."""

    manifest: Manifest
    num_train: int
    repeats: np.ndarray
    leakage: np.ndarray
    lines: tuple[dict[str, object], ...]


def find_duplicates(
    manifests: list[Manifest], comparison: Comparison, num_workers: int
) -> list[Outcome]:
    """Compare all samples of the datasets within each task; nothing is written.

    Raises `DataError` if a dataset is listed twice or cannot be read.
    """
    if len({manifest.root.resolve() for manifest in manifests}) < len(manifests):
        raise DataError("a dataset is listed twice; list each dataset once")
    outcomes = []
    for task in dict.fromkeys(manifest.task for manifest in manifests):
        own = [manifest for manifest in manifests if manifest.task == task]
        outcomes += _of_one_task(own, comparison, num_workers)
    return outcomes


def write_masks(outcome: Outcome) -> list[Mask]:
    """Write the masks and the report of a dataset, replacing those of an earlier search."""
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
                **describe(row, with_dataset=False),
                "like": describe(int(like[row]), with_dataset=True),
                **_shared_feature(traits, row, int(like[row])),
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
    name = f"dedup ({manifests[0].task})"
    return Traits.joined(map_shards(partial(_shard_traits, comparison), shards, num_workers, name))


def _shard_traits(comparison: Comparison, manifest: Manifest) -> Traits:
    """The traits of a single-shard dataset."""
    ((split, _),) = manifest.splits.items()
    reader = SplitReader(manifest, split)
    num_samples = len(reader)
    # Columns of near-duplicate features are empty unless needed.
    width = NUM_HASHES if comparison.is_near else 0
    traits = Traits(
        content=reader.columns["content_hash"].astype(np.uint64),
        words=np.zeros(num_samples, np.uint64),
        media=np.zeros(num_samples, np.uint64),
        has_image_hash=np.zeros(num_samples, bool),
        image_hash=np.zeros(num_samples, np.uint64),
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
    except DataError:
        # Adopted tars may have samples without valid text; only their content is compared.
        return
    digest = b"".join(hash64(data).to_bytes(8, "little") for _, data in media)
    traits.media[row] = hash64(digest) if media else 0
    # Texts without words, such as symbols only, are not compared.
    if any(words):
        traits.words[row] = hash64(digest + b"\0" + "\n".join(words).encode())
    if not comparison.is_near:
        return
    if manifest.task == "image-caption" and images:
        try:
            image_hash = image_signature(images[0][1])
        except DataError:
            return  # a broken image of an adopted tar resembles none
        if image_hash is not None:
            traits.has_image_hash[row] = True
            traits.image_hash[row], traits.thumbnail[row] = image_hash
    elif not media:
        signature = text_signature(" ".join(words))
        if signature is not None:
            traits.has_signature[row] = True
            traits.signature[row] = signature


def _same(traits: Traits, comparison: Comparison) -> np.ndarray:
    """Pairs [num_pairs, 2] of duplicate samples."""
    pairs = [_equal(traits.content), _equal(traits.words)]
    if comparison.is_near:
        rows = np.flatnonzero(traits.has_image_hash)
        found = near_duplicate_images(
            traits.image_hash[rows], traits.thumbnail[rows], comparison.max_distance
        )
        pairs.append(rows[found])
        rows = np.flatnonzero(traits.has_signature)
        found = near_duplicate_texts(traits.signature[rows], comparison.min_similarity)
        pairs.append(rows[found])
    return np.concatenate(pairs)


def _equal(hashes: np.ndarray) -> np.ndarray:
    """Pairs that link all samples of equal hash; 0 means no hash."""
    rows = np.flatnonzero(hashes)
    return rows[equal_neighbors(hashes[rows])]


def _groups(num_samples: int, pairs: np.ndarray) -> np.ndarray:
    """The first sample of each sample's group, int64 [num_samples]; groups are connected by pairs."""
    labels = np.arange(num_samples)
    one, other = pairs[:, 0], pairs[:, 1]
    while True:
        lower = np.minimum(labels[one], labels[other])
        if (labels[one] == lower).all() and (labels[other] == lower).all():
            return labels
        # Roots take the lower label, then all nodes follow their root: few rounds even for long chains.
        np.minimum.at(labels, labels[one], lower)
        np.minimum.at(labels, labels[other], lower)
        while (labels != labels[labels]).any():
            labels = labels[labels]


def _first_of_groups(groups: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The first chosen sample in each sample's group, or -1 if there is none."""
    rows = np.flatnonzero(chosen)
    first = np.full(len(groups), len(groups))
    np.minimum.at(first, groups[rows], rows)
    found = first[groups]
    return np.where(found == len(groups), -1, found)


def _describer(parts: list[_Part]) -> Callable[..., dict[str, object]]:
    readers = {part.start: SplitReader(part.manifest, part.split) for part in parts}

    def describe(row: int, with_dataset: bool) -> dict[str, object]:
        part = next(part for part in reversed(parts) if part.start <= row)
        key = readers[part.start].read(row - part.start)["__key__"]
        entry: dict[str, object] = {"id": row - part.start, "key": key}
        dataset = {"dataset": part.manifest.name, "split": part.split}
        return {**dataset, **entry} if with_dataset else entry

    return describe


def _shared_feature(traits: Traits, row: int, like: int) -> dict[str, object]:
    """The feature by which two samples are duplicates; `chain` if only via others in between."""
    for name in ("content", "words", "media"):
        value = getattr(traits, name)
        if value[row] and value[row] == value[like]:
            return {"by": name}
    if traits.has_image_hash[row] and traits.has_image_hash[like]:
        return {
            "by": "image",
            "bits": int(bit_distance(traits.image_hash[row], traits.image_hash[like])[0]),
        }
    if traits.has_signature[row] and traits.has_signature[like]:
        share = similarity(traits.signature[row : row + 1], traits.signature[like : like + 1])
        return {"by": "text", "similarity": round(float(share[0]), 3)}
    return {"by": "chain"}
