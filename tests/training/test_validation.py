"""Validation on a subset: drawn by the seed, the same at each validation and on any number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.training.session import Request, Session, prepare
from muomni.training.validation import SplitBatches, validate, validation_subset
from tests.ranks import RankPool
from tests.training.runs import thinker_config


def open_session(config: RunConfig) -> Session:
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    return prepare(Request(config, Path(), Path(), engine_json, "never"), discover())


def changed(num_samples: int | None, seed: int = 0) -> dict[str, Any]:
    return {"seed": seed, "training": {"validate_samples": num_samples}}


def test_the_subset_is_drawn_from_the_entire_split(text_data: Path) -> None:
    config = thinker_config(text_data, changed(6))
    session = open_session(config)
    source = session.val
    assert source is not None
    ids = validation_subset(source, config)
    assert len(set(ids.tolist())) == 6 and ids.tolist() == sorted(ids)
    assert ids.max() >= 6  # not the first ones
    np.testing.assert_array_equal(validation_subset(source, config), ids)
    others = [
        validation_subset(source, thinker_config(text_data, changed(6, seed))) for seed in (1, 2, 3)
    ]
    assert any(other.tolist() != ids.tolist() for other in others)
    lengths = session.stage.view().lengths(source)
    shortest = np.sort(lengths.all())[:6].sum()
    assert lengths[ids].sum() > shortest
    for num_samples in (None, 10**6):
        every = validation_subset(source, thinker_config(text_data, changed(num_samples)))
        assert len(every) == source.num_included
    batches = [micro for micro, _ in SplitBatches(session.stage, source, session.device, ids)]
    assert sorted(i for micro in batches for i in micro.ids) == ids.tolist()


def measure(config: RunConfig) -> tuple[list[int], float]:
    """The samples of this rank, and the loss over all ranks."""
    session = open_session(config)
    assert session.val is not None
    torch.manual_seed(0)
    task = session.stage.build().eval()
    ids = validation_subset(session.val, config)
    batches = list(SplitBatches(session.stage, session.val, session.device, ids))
    with torch.no_grad():
        metrics = validate(session.stage, task, batches)
    return [i for micro, _ in batches for i in micro.ids], metrics["loss"]


def test_any_number_of_ranks_measures_the_same_samples(
    text_data: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, changed(7))
    ((alone, expected),) = one_rank.run(measure, config=config)
    (first, loss), (second, same_loss) = two_ranks.run(measure, config=config)
    assert sorted(first + second) == sorted(alone) and loss == same_loss
    assert abs(loss - expected) < 1e-6
