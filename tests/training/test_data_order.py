"""The plan's digest identifies the order of samples, so a run resumes only with the same order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muomni.distributed.discovery import Ranks
from muomni.errors import ConfigError
from muomni.training.planning.dry_run import describe, find_device
from muomni.training.session import Request, Session, prepare
from tests.corpora import write_text_dataset, write_tokenizer
from tests.training.runs import thinker_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_text_dataset(tmp_path / "books", num_train=100)
    write_text_dataset(tmp_path / "web", num_train=300)
    write_tokenizer(tmp_path / "tokenizer.model")
    return tmp_path


def opened(root: Path, changes: dict[str, Any] | None = None, world_size: int = 1) -> Session:
    config = thinker_config(root, changes)
    return prepare(Request(config, Path(), Path(), {}, "never"), Ranks(0, 0, world_size, "test"))


def test_the_digest_depends_on_the_order_and_not_on_ranks_or_workers(root: Path) -> None:
    digest = opened(root).feed.digest
    assert opened(root, world_size=4).feed.digest == digest
    assert opened(root, {"data": {"num_workers": 3, "prefetch": 7}}).feed.digest == digest
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"batch": {"seq_len": 96}},
        {"batch": {"shuffle_window": 32}},
        {"batch": {"global_tokens": 512}},
        {"data": {"mix": {"alpha": 0.5}}},
        {"data": {"mix": {"weights": {"books": 1, "web": 3}}}},
        {"data": {"mix": {"weights": {"books": 1, "web": 3}, "unit": "length"}}},
    ]
    digests = {opened(root, change).feed.digest for change in changes}
    (root / "web" / "exclude").mkdir()
    np.save(root / "web" / "exclude" / "late.npy", np.array([5, 6], dtype=np.uint64))
    content = {"split": "train", "ids_file": "late.npy"}
    (root / "web" / "exclude" / "late.json").write_text(json.dumps(content))
    masked = opened(root)
    assert len({digest, masked.feed.digest, *digests}) == len(changes) + 2
    assert describe(masked, find_device(masked))["train_samples"] == 398
    num_steps = masked.planned.plan.num_steps(1)
    drawn = {
        i
        for s in range(num_steps)
        for batch in masked.planned.plan.rank_step(s, 0, 1)
        for i in batch.ids
    }
    assert drawn == set(range(400)) - {105, 106}


def test_a_missing_corpus_is_reported(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"names unknown corpus 'wep'.*corpora: books, web"):
        opened(root, {"data": {"mix": {"weights": {"wep": 1, "books": 1}}}})
