"""The realized mix is logged, and a run may change its mix when it resumes."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import tests.training.runs as runs
from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks
from muomni.errors import CheckpointError
from muomni.run_folder import RunFolder
from muomni.training.session import Request, Session, prepare
from tests.corpora import write_text_dataset, write_tokenizer
from tests.ranks import RankPool
from tests.training.runs import thinker_config

NUM_BOOKS = 100
FIRST, SECOND = {"books": 1, "web": 3}, {"books": 3, "web": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mix")
    write_text_dataset(root / "books", num_train=NUM_BOOKS)
    write_text_dataset(root / "web", num_train=300)
    write_tokenizer(root / "tokenizer.model")
    return root


def config_of(
    root: Path, weights: dict[str, int] | None, max_steps: int = 6, **data: Any
) -> RunConfig:
    mix = {} if weights is None else {"mix": {"weights": weights}}
    training = {"max_steps": max_steps, "recorders": []}
    return thinker_config(root, {"data": {**mix, **data}, "training": training})


def train(config: RunConfig, run: Path, allow: bool = False) -> dict[str, Any]:
    """`runs.train`, as a start that may change the mix."""

    def request(*arguments: Any) -> Request:
        return Request(*arguments, allow_mix_change=allow)

    with mock.patch.object(runs, "Request", request):
        return runs.train(config, run)


def opened(config: RunConfig, run: Path, allow: bool = False) -> Session:
    return prepare(Request(config, run, run, {}, "auto", allow), Ranks())


def ids_of(session: Session, step: int, num_ranks: int = 1) -> list[int]:
    """The samples of a step on all ranks."""
    plan = session.planned.plan
    parts = [batch for rank in range(num_ranks) for batch in plan.rank_step(step, rank, num_ranks)]
    return [index for batch in parts for index in batch.ids]


def fractions(result: dict[str, Any], name: str = "books") -> list[float]:
    return [line[f"data/{name}_fraction"] for line in result["curve"]]


def test_the_fractions_are_those_of_the_samples_on_any_layout(
    root: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    alone = one_rank.run(train, config=config_of(root, FIRST), run=tmp_path / "one")[0]
    shared = two_ranks.run(train, config=config_of(root, FIRST), run=tmp_path / "two")[0]
    session = opened(config_of(root, FIRST), tmp_path / "none")
    expected = [np.mean(np.array(ids_of(session, step)) < NUM_BOOKS) for step in range(6)]
    assert fractions(alone) == pytest.approx(expected) == fractions(shared)
    assert fractions(alone, "web") == pytest.approx([1 - each for each in expected])


def test_one_dataset_has_no_fraction(root: Path, tmp_path: Path, one_rank: RankPool) -> None:
    config = config_of(root / "books", None, tokenizer=str(root / "tokenizer.model"))
    (result,) = one_rank.run(train, config=config, run=tmp_path)
    assert not any(name.startswith("data/") for line in result["curve"] for name in line)


def test_another_mix_is_refused_with_the_flag(
    root: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    one_rank.run(train, config=config_of(root, FIRST), run=tmp_path)
    checkpoint = RunFolder(tmp_path, "thinker").checkpoints / "step_00000006"
    with pytest.raises(CheckpointError) as refused:
        opened(config_of(root, SECOND, 12), tmp_path)
    assert str(refused.value) == (
        f"data.mix differs from that of checkpoint {checkpoint}; restore it, or add --allow-mix-change to "
        f"continue with the new mix after step 6"
    )
    assert opened(config_of(root, FIRST, 12), tmp_path).feed.resumed_digest
    # The flag allows no other change.
    other = thinker_config(
        root, {"seed": 1, "data": {"mix": {"weights": SECOND}}, "training": {"max_steps": 12}}
    )
    with pytest.raises(CheckpointError, match="other data, mix"):
        one_rank.run(train, config=other, run=tmp_path, allow=True)
    with pytest.raises(CheckpointError, match="other data, mix"):
        one_rank.run(train, config=config_of(root, None, 12), run=tmp_path, allow=True)


def test_a_new_mix_applies_to_later_steps_and_later_starts(
    root: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    first = opened(config_of(root, FIRST), tmp_path)
    one_rank.run(train, config=config_of(root, FIRST), run=tmp_path)
    config = config_of(root, SECOND, 30)
    changed = opened(config, tmp_path, allow=True)
    assert [ids_of(changed, step) for step in range(6)] == [
        ids_of(first, step) for step in range(6)
    ]
    (result,) = one_rank.run(train, config=config, run=tmp_path, allow=True)
    expected = [np.mean(np.array(ids_of(changed, step)) < NUM_BOOKS) for step in range(30)]
    assert fractions(result) == pytest.approx(expected)
    # 1/4 before, 3/4 from the next shuffle window (64 samples) on.
    assert np.mean(expected[:6]) < 0.4 and np.mean(expected[-10:]) > 0.6
    recorded = RunFolder(tmp_path, "thinker").resolved()["mix"]
    assert [(part["step"], part["quotas"]) for part in recorded] == [
        (0, [16384, 49152]), (6, [49152, 16384])
    ]  # fmt: skip
    # No sample is lost or repeated at the change: each corpus continues its own order.
    stream, _ = changed.planned.plan.order.samples(0, recorded[1]["start"] + 200)
    books = stream[stream < NUM_BOOKS]
    assert len(set(books[:NUM_BOOKS].tolist())) == min(len(books), NUM_BOOKS)
    # Later starts need no flag, and may go back.
    later = config_of(root, SECOND, 36)
    assert opened(later, tmp_path).feed.digest == changed.feed.digest
    one_rank.run(train, config=later, run=tmp_path)
    back = opened(config_of(root, FIRST, 40), tmp_path, allow=True)
    assert [part["step"] for part in back.feed.mix] == [0, 6, 36]


def test_a_change_right_after_the_start_of_a_fixed_batch_is_exact() -> None:
    from muomni.data.sampling.lengths import Lengths
    from muomni.data.sampling.plan import Batching, Plan

    lengths = Lengths.of_array(np.ones(50, dtype=np.int64))
    fixed = Plan(lengths, Batching("fixed", 8, 8, shuffle_window=16), seed=0)
    assert [fixed.position_after(step) for step in (0, 1, 10)] == [0, 8, 80]
    # 3 windows of 16 or 17 samples; packed, 4 sequences of 4 samples are a step.
    packed = Plan(lengths, Batching("pack", 4, 4, 4, shuffle_window=16), seed=0)
    assert [packed.position_after(step) for step in (0, 1, 2, 4)] == [0, 16, 33, 66]
