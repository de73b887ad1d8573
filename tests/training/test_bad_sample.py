"""A sample that fails to decode only drops out of the loss, on any layout; too many stop the run."""

import re
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from muomni.config.run import RunConfig
from muomni.data.shards.writer import SampleCost, ShardWriter
from muomni.distributed.discovery import discover
from muomni.errors import DataError
from muomni.observe.metrics_log import read_lines
from muomni.training.session import Request, open_loop, prepare
from tests.corpora import sentences, write_text_dataset, write_tokenizer
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


@pytest.fixture(scope="module")
def all_bad(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text dataset whose training samples are all damaged."""
    data = tmp_path_factory.mktemp("all-bad")
    shutil.copytree(root, data, dirs_exist_ok=True)
    for shard in (data / "text" / "train").glob("*.tar"):
        with tarfile.open(shard) as tar:
            texts = [member for member in tar if member.name.endswith(".txt")]
        with shard.open("r+b") as file:
            for member in texts:
                file.seek(member.offset_data)
                file.write(b"\xff")
    return data


def error_of(config: RunConfig, run: Path) -> tuple[str, bool]:
    with pytest.raises(DataError) as caught:
        train(config, run)
    return str(caught.value), caught.value.is_rank_local


def test_a_run_without_usable_samples_stops_and_exports_nothing(
    all_bad: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    settings = {"config": thinker_config(all_bad), "run": tmp_path}
    (first, is_local), other = two_ranks.run(error_of, **settings)
    assert (first, is_local) == other and not is_local
    assert re.match(r"none of the last \d+ samples is usable: sample \d+ of .* \(.*UTF-8", first)
    assert first.count("(key ") == 3 and "correct the data" in first
    folder = tmp_path / "thinker"
    assert not (folder / "export").exists() and not list((folder / "checkpoints").glob("step_*"))
    assert "loss" not in (folder / "metrics.jsonl").read_text()


def test_a_split_without_usable_samples_stops_validation(
    all_bad: Path, root: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    data = tmp_path / "data"
    shutil.copytree(root, data)
    shard = next((data / "text" / "val").glob("*.tar"))
    with tarfile.open(shard) as tar:
        texts = [member for member in tar if member.name.endswith(".txt")]
    with shard.open("r+b") as file:
        for member in texts[:2]:
            file.seek(member.offset_data)
            file.write(b"\xff")
    changes = {"training": {"max_steps": 1, "validate_samples": None}}
    settings = {"config": thinker_config(data, changes), "run": tmp_path / "run"}
    ((error, is_local),) = one_rank.run(error_of, **settings)
    assert re.match(r"2 of \d+ samples of split 'val' are not usable", error) and not is_local
    assert not (tmp_path / "run" / "thinker" / "export").exists()


def steps_around_a_bad_sample(config: RunConfig, run: Path, zero: int) -> list[Any]:
    """Whether each step changed the weights, and the logged steps."""
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": zero}}
    loop = open_loop(prepare(Request(config, run, run, engine_json, "never"), discover()))
    loop.open()
    loop.engine.train()
    states = [loop.engine.full_state("")]
    num_bad_steps = []
    for _ in range(6):
        num_bad_steps.append(loop.train_step().num_bad_steps)
        loop.log()
        states.append(loop.engine.full_state(""))
    loop.close("FINISHED")
    loop.engine.deepspeed.destroy()
    changes = [
        any(not before[name].equal(after[name]) for name in before)
        for before, after in pairwise(states)
    ]
    logged = read_lines(run / "thinker" / "metrics.jsonl")
    finite = [line["step"] for line in logged if line["loss"] is not None]
    return [changes, [line["step"] for line in logged], finite, num_bad_steps]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_step_without_usable_samples_changes_nothing(
    zero: int, root: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    texts = [text.encode() for text in sentences(12, seed=3)]
    texts[3] = b"\xff"  # the only sample of step 4
    with ShardWriter(tmp_path / "tars", "0.tar", "train") as writer:
        for number, text in enumerate(texts):
            writer.add(f"s{number}", [("txt", text)], "g", SampleCost())
    stream = {
        "shards": [str(tmp_path / "tars" / "0.tar")],
        "samples_per_shard": 12,
        "has_val": False,
    }
    changes = {"data": {"stream": stream}, "batch": {"micro_batches_per_step": 1}}
    settings = {"config": thinker_config(root, changes), "run": tmp_path / "run", "zero": zero}
    (result,) = one_rank.run(steps_around_a_bad_sample, **settings)
    steps = [1, 2, 3, 5, 6]
    assert result == [[True, True, True, False, True, True], steps, steps, [0] * 6]
