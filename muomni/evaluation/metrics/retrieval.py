"""Image-text retrieval and zero-shot classification over a full split (Radford et al. 2021).

Ranks embed their shards and gather all features, so the metrics do not depend on the number of ranks.
Ties count as errors, so a model with constant embeddings retrieves nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muomni.data.shards.source import Source
from muomni.data.text.sample_texts import sample_captions
from muomni.data.views.image_text import (
    CAPTION,
    IMAGE,
    NO_GROUP,
    NUM_GROUPS,
    ImageTextView,
    group_of,
    image_group,
)
from muomni.distributed import collectives
from muomni.errors import DataError
from muomni.evaluation.metrics.sample_types import reported_types, sample_type
from muomni.evaluation.metrics.tally import most_common, sum_counts
from muomni.models.vision.clip import Clip
from muomni.training.validation import LocatedBatch

DEPTHS = (1, 5, 10)
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class SplitFeatures:
    """Unit-norm features of all pairs of a split, on the CPU, and their groups."""

    images: Tensor  # [N, d]
    texts: Tensor  # [N, d]
    groups: Tensor  # [N, G] int64; pairs with an equal group in a column are equally correct


@torch.no_grad()
def embed_split(clip: Clip, batches: Iterable[LocatedBatch]) -> SplitFeatures:
    """Embed this rank's batches and gather the features of all ranks; a collective."""
    size = clip.config.embedding_size
    no_groups = torch.empty(0, NUM_GROUPS, dtype=torch.long)
    parts = [(torch.empty(0, size), torch.empty(0, size), no_groups)]
    for _, batch in batches:
        output = clip(batch["images"], batch["token_ids"], batch["token_lengths"])
        is_real = batch["groups"][:, CAPTION] != NO_GROUP
        groups = batch["groups"][is_real]
        parts.append((output.image[is_real].cpu(), output.text[is_real].cpu(), groups.cpu()))
    local = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    gathered = collectives.gather_objects(local)
    return SplitFeatures(*(torch.cat(column) for column in zip(*gathered, strict=True)))


def recall(features: SplitFeatures, depths: Sequence[int] = DEPTHS) -> dict[str, float]:
    """Return `text_recall@k` (image to caption), `image_recall@k` (caption to image), and the expected
    values of a random ranking as `chance_...`.

    Pairs with an equal image or caption are equally correct. NaN for an empty split.
    """
    pairs = {
        "text": (features.images, features.texts),
        "image": (features.texts, features.images),
    }
    metrics: dict[str, float] = {}
    for name, (queries, candidates) in pairs.items():
        ranks, chances = _ranks(queries, candidates, features.groups, features.groups, depths)
        for column, depth in enumerate(depths):
            metrics[f"{name}_recall@{depth}"] = float((ranks < depth).double().mean())
            metrics[f"chance_{name}_recall@{depth}"] = float(chances[:, column].mean())
    return metrics


@torch.no_grad()
def zero_shot_hits(
    clip: Clip,
    features: SplitFeatures,
    names: Sequence[str],
    view: ImageTextView,
    device: torch.device,
) -> Tensor:
    """Whether each image [N] is classified correctly among `names`, which must include all true names."""
    groups = torch.tensor([[group_of(name)] for name in names])
    true_groups = features.groups[:, [CAPTION]]
    texts = []
    for start in range(0, len(names), _CHUNK):
        ids = [view.token_ids(name) for name in names[start : start + _CHUNK]]
        padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        for row, name_ids in enumerate(ids):
            padded[row, : len(name_ids)] = torch.tensor(name_ids)
        lengths = torch.tensor([len(name_ids) for name_ids in ids])
        texts.append(clip.embed_text(padded.to(device), lengths.to(device)).cpu())
    ranks, _ = _ranks(features.images, torch.cat(texts), true_groups, groups, (1,))
    return ranks < 1


def hits_by_type(
    hits: Tensor, features: SplitFeatures, source: Source
) -> dict[str, tuple[float, float]]:
    """Accuracy on the samples of each type, and the share of their most frequent caption.

    `hits` [N] are those of `zero_shot_hits` on the split of `source`.
    """
    types: dict[int, str] = {}
    for index in range(len(source)):
        sample = source.read(index)
        if type := sample_type(sample):
            types[image_group(sample)] = type
    of_samples = [types.get(image, "") for image in features.groups[:, IMAGE].tolist()]
    found = {}
    for type in reported_types(of_samples):
        is_its = torch.tensor([other == type for other in of_samples])
        counts = torch.unique(features.groups[is_its, CAPTION], return_counts=True)[1]
        frequent = int(counts.max()) / int(counts.sum())
        found[type] = float(hits[is_its].double().mean()), frequent
    return found


def majority_top1(features: SplitFeatures, train: Iterable[dict[str, Any]]) -> float:
    """Top-1 accuracy of the most frequent first caption in this rank's shard `train` and those of others.

    NaN without training samples. A collective.
    """
    counts: Counter[int] = Counter()
    for sample in train:
        try:
            counts[group_of(sample_captions(sample)[0])] += 1
        except DataError:
            continue  # training skips it, too
    frequent = most_common(sum_counts(counts))
    if frequent is None:
        return float("nan")
    return float((features.groups[:, CAPTION] == frequent).double().mean())


def class_names(sources: Iterable[Source]) -> list[str]:
    """The distinct first captions of all samples, sorted: the classes of zero-shot classification."""
    names: dict[int, str] = {}
    for source in sources:
        for index in range(len(source)):
            try:
                first = sample_captions(source.read(index))[0]
            except DataError:
                continue  # counted by the batches of the split
            names.setdefault(group_of(first), first)
    return sorted(names.values())


def _ranks(
    queries: Tensor,
    candidates: Tensor,
    query_groups: Tensor,
    candidate_groups: Tensor,
    depths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the number of wrong candidates [N] ranked above the best correct one, ties included, and
    the probability [N, len(depths)] that a random ranking has a correct one among the first k."""
    ranks, chances = [], []
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        similarity = queries[rows] @ candidates.T
        is_correct = (query_groups[rows, None] == candidate_groups).any(2)
        best = similarity.masked_fill(~is_correct, -torch.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best) & ~is_correct).sum(1))
        chances.append(_chance(is_correct.sum(1), len(candidates), depths))
    empty = torch.empty(0, dtype=torch.long), torch.empty(0, len(depths), dtype=torch.double)
    return torch.cat([empty[0], *ranks]), torch.cat([empty[1], *chances])


def _chance(num_correct: Tensor, num_candidates: int, depths: Sequence[int]) -> Tensor:
    """Probability that `depth` candidates sampled without replacement include a correct one."""
    columns = []
    for depth in depths:
        missed = torch.ones(len(num_correct), dtype=torch.double)
        for num_drawn in range(min(depth, num_candidates)):
            wrong = (num_candidates - num_correct - num_drawn).clamp(min=0)
            missed = missed * wrong / (num_candidates - num_drawn)
        columns.append(1 - missed)
    return torch.stack(columns, 1)
