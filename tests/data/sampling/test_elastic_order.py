"""From shards to batches: the same global batches for any number of ranks and workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muomni.config.run import DataSection, MixSection
from muomni.data.loading.loader import Loader, PlannedDataset
from muomni.data.sampling.lengths import Lengths
from muomni.data.sampling.mix import MixSegment, configured_quotas, open_order
from muomni.data.sampling.plan import Batching, Plan
from muomni.data.shards.manifest import Manifest, Split, fingerprint
from muomni.data.shards.source import Source
from muomni.data.shards.writer import SampleCost, ShardWriter
from muomni.data.views.base import Batch, View

NUM_STEPS = 12
BATCHINGS = {
    "fixed": Batching("fixed", 128, 16, shuffle_window=256),
    "bucket": Batching("bucket", 6000, 1500, shuffle_window=256),
    "pack": Batching("pack", 16, 2, seq_len=500, shuffle_window=256),
}
KINDS = [*BATCHINGS, "mixed"]


class NumberView(View[int]):
    """Samples are numbers; a batch lists them."""

    def lengths(self, source: Source) -> Lengths:
        return Lengths(len(source), lambda ids: source.column("num_chars", ids), "chars")

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> int:
        return int(sample["txt"])

    def collate(self, sequences: list[list[int]]) -> Batch:
        flat = [number for sequence in sequences for number in sequence]
        return {"numbers": torch.tensor(flat), "units": torch.tensor(float(len(flat)))}


def write_shards(root: Path, sizes: tuple[int, ...], first: int) -> Manifest:
    records = []
    for shard, size in enumerate(sizes):
        with ShardWriter(root, f"train/{root.name}-{shard:06d}.tar", "train") as writer:
            for number in range(first, first + size):
                cost = SampleCost(num_chars=number * 7919 % 97 + 3)
                writer.add(f"k{number}", [("txt", str(number).encode())], str(number), cost)
        first += size
        assert writer.record is not None
        records.append(writer.record)
    splits = {"train": Split(shards=tuple(records))}
    manifest = Manifest(
        root=root, name=root.name, task="text", reader="test", split_rule="given",
        fingerprint=fingerprint(splits), splits=splits,
    )  # fmt: skip
    (root / "manifest.json").write_text(manifest.to_json())
    return manifest


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Two corpora with shards of very different sizes."""
    root = tmp_path_factory.mktemp("data")
    return [
        write_shards(root / "one", (1000, 7, 333), 0),
        write_shards(root / "two", (2000,), 1340),
    ]


def open_plan(manifests: list[Manifest], kind: str) -> tuple[PlannedDataset, Plan]:
    source = Source(manifests, "train")
    view = NumberView()
    lengths = view.lengths(source)
    batching = BATCHINGS["bucket" if kind == "mixed" else kind]
    segments = []
    if kind == "mixed":
        mix = MixSection(weights={"one": 2, "two": 1})
        segments = [MixSegment(0, 0, configured_quotas(source, lengths, mix))]
    order = open_order(source, DataSection(), 3, batching.shuffle_window, segments)
    plan = Plan(lengths, batching, 3, source.describe, order)
    return PlannedDataset(source, view, 3), plan


def global_steps(
    manifests: list[Manifest], kind: str, start: int, world_size: int, num_workers: int = 0
) -> list[list[int]]:
    """The samples of each step in order, assembled from the batches of all ranks."""
    shares = []
    for rank in range(world_size):
        dataset, plan = open_plan(manifests, kind)
        loader = Loader(
            dataset, plan.rank_batches(start, rank, world_size), num_workers, prefetch=2
        )
        batches = iter(loader)
        shares.append(
            [
                [
                    next(batches)["numbers"].tolist()
                    for _ in range(plan.num_micro_batches(step, world_size))
                ]
                for step in range(start, NUM_STEPS)
            ]
        )
    return [
        [number for turn in zip(*of_ranks, strict=True) for batch in turn for number in batch]
        for of_ranks in zip(*shares, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_global_batches_are_the_same_for_any_number_of_ranks(
    kind: str, manifests: list[Manifest]
) -> None:
    reference = global_steps(manifests, kind, 0, 1)
    for world_size, start in ((2, 0), (3, 5), (8, 0), (1, 7), (12, 11)):
        assert global_steps(manifests, kind, start, world_size) == reference[start:]


def test_a_worker_does_not_change_batches(manifests: list[Manifest]) -> None:
    reference = global_steps(manifests, "mixed", 7, 1)
    assert global_steps(manifests, "mixed", 7, 1, num_workers=1) == reference


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4, 6])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_ranks_and_workers_together_do_not_change_batches(
    num_workers: int, world_size: int, manifests: list[Manifest]
) -> None:
    for kind in ("pack", "mixed"):
        reference = global_steps(manifests, kind, 9, 1)
        assert global_steps(manifests, kind, 9, world_size, num_workers) == reference


@pytest.mark.parametrize("kind", BATCHINGS)
def test_every_sample_is_loaded_once_per_epoch(kind: str, manifests: list[Manifest]) -> None:
    dataset, plan = open_plan(manifests, kind)
    numbers = [
        dataset.source.read(sample)["txt"]
        for step in range(plan.num_steps(1))
        for batch in plan.rank_step(step, 0, 1)
        for ids, epochs in zip(batch.sequences, batch.epochs or (), strict=True)
        for sample, epoch in zip(ids, epochs, strict=True)
        if epoch == 0
    ]
    assert sorted(map(int, numbers)) == list(range(3340))
