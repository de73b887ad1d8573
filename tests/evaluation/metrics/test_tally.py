"""Sums over ranks, including ranks without samples."""

from collections import Counter

import torch

from muomni.evaluation.metrics.tally import Tally, most_common, ratio, sum_counts
from tests.ranks import RankPool


def _tally_of_uneven_ranks() -> tuple[dict[str, list[float]], object]:
    rank = torch.distributed.get_rank()
    tally = Tally()
    tally.add("both", torch.tensor([1.0 + rank, 10.0]))
    if rank == 1:
        tally.add("only_one", torch.tensor(5, dtype=torch.int32))
    words = ["b", "b", "a"] if rank == 0 else ["a", "c"]
    sums = {name: value.tolist() for name, value in tally.reduce().items()}
    return sums, most_common(sum_counts(Counter(words)))


def test_ranks_may_have_different_sums(two_ranks: RankPool) -> None:
    for sums, frequent in two_ranks.run(_tally_of_uneven_ranks):
        assert sums == {"both": [3.0, 20.0], "only_one": 5.0}
        assert frequent == "a"  # tied with b, and smaller


def test_ratio_without_weight_is_nan() -> None:
    assert ratio(torch.tensor([3.0, 4.0])) == 0.75
    assert ratio(torch.tensor([0.0, 0.0])) != ratio(torch.tensor([0.0, 0.0]))
    assert ratio(None) != ratio(None)
    assert most_common(Counter()) is None


def test_added_tensors_are_copied() -> None:
    tally, counts = Tally(), torch.zeros(2)
    tally.add("counts", counts)
    counts += 1
    assert tally.reduce()["counts"].tolist() == [0.0, 0.0]
