"""A sample that fails to decode only drops out of the loss, on any layout."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from muomni.distributed.discovery import discover
from muomni.training.session import Request, prepare
from tests.corpora import write_text_dataset, write_tokenizer
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train

BAD = 103


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text dataset with one damaged training sample."""
    root = tmp_path_factory.mktemp("damaged")
    write_text_dataset(root / "text", num_train=150)
    write_tokenizer(root / "tokenizer.model")
    shard = next((root / "text" / "train").glob("*.tar"))
    with tarfile.open(shard) as tar:
        texts = [member for member in tar if member.name.endswith(".txt")]
    with shard.open("r+b") as file:
        file.seek(texts[BAD].offset_data)
        file.write(b"\xff")  # not UTF-8
    return root


@pytest.fixture(scope="module")
def reference(root: Path) -> list[float]:
    return reference_curve(thinker_config(root))[0].losses


def ranks_that_read_it(root: Path) -> list[int]:
    """Which of two ranks reads the bad sample, each time that the run below reads it."""
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    request = Request(thinker_config(root), Path(), Path(), engine_json, "never")
    plan = prepare(request, discover({})).planned.plan
    return [
        place % 2
        for step in range(20)
        for place, micro in enumerate(plan.rank_step(step, 0, 1))
        if BAD in micro.ids
    ]


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_two_ranks_finish_with_the_reference_curve_if_one_reads_it(
    zero: str, root: Path, tmp_path: Path, reference: list[float], two_ranks: RankPool
) -> None:
    results = two_ranks.run(train, config=thinker_config(root), run=tmp_path, zero=zero)
    assert [result["step"] for result in results] == [20, 20]
    assert results[0]["losses"] == pytest.approx(reference, abs=2e-5)
    # It is counted although the rank that logs does not read it.
    assert ranks_that_read_it(root) == [1]
    assert results[0]["curve"][-1]["num_bad_samples"] == 1
