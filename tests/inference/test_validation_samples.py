"""Samples at validations come from the weights in training, on any layout, and do not touch the training."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import muomni.inference.samples as samples
from muomni.checkpoint.export import read_export
from muomni.config.run import RunConfig
from muomni.inference.samples import ValidationSamples, sample_at_validations
from muomni.run_folder import RunFolder
from muomni.training.loop import Loop
from tests.corpora import write_text_dataset, write_tokenizer
from tests.media_corpora import write_image_dataset, write_speech_dataset
from tests.ranks import RankPool
from tests.training.engine.test_expert_parallel import engine, moe_config
from tests.training.runs import thinker_config, train
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

STAGES = ("thinker", "audio_encoder", "vision_encoder", "codec", "talker", "sft")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data roots, by the kind of data; that of `omni` has the exports of all stages in `run`."""
    text, media = (tmp_path_factory.mktemp(name) for name in ("text", "media"))
    write_text_dataset(text / "text")
    write_speech_dataset(media / "speech", num_train=12, num_val=4)
    write_speech_dataset(media / "tts", num_train=4, num_val=2, task="tts")
    write_image_dataset(media / "images")
    for root in (text, media):
        write_tokenizer(root / "tokenizer.model")
    omni = write_root(tmp_path_factory.mktemp("omni"))
    return {"text": text, "media": media, "omni": omni}


def train_with_samples(
    config: RunConfig, run: Path, zero: str | dict[str, Any], upstream: Path
) -> dict[str, Any]:
    """`train` with sample outputs as the config says; the draw is that after the last step."""
    opened = Loop.open

    def open_with_samples(self: Loop) -> None:
        sample_at_validations(self)
        opened(self)

    with mock.patch.object(Loop, "open", open_with_samples):
        result = train(config, run, zero, upstream=upstream)
    return {**result, "draw": torch.rand(1).item()}


def config_of(stage: str, roots: dict[str, Path], **training: Any) -> RunConfig:
    changes: dict[str, Any] = {
        "training": {"max_steps": 4, "validate_every": 2, "recorders": [], **training}
    }
    if stage == "thinker":
        return thinker_config(roots["text"], changes)
    if stage in ("talker", "sft"):
        return omni_run(stage, roots["omni"], changes)
    return stage_config(stage, roots["media"], changes)


def written(run: Path, stage: str) -> dict[str, set[str]]:
    """The names of the sample files, by folder."""
    folders = sorted(RunFolder(run, stage).samples.glob("step_*"))
    return {folder.name: {path.name for path in folder.iterdir()} for folder in folders}


@pytest.mark.parametrize(
    ("stage", "zero"), [*((stage, "zero1") for stage in STAGES), ("thinker", "zero3")]
)
def test_training_is_equal_with_and_without(
    stage: str, zero: str, roots: dict[str, Path], tmp_path: Path, one_rank: RankPool
) -> None:
    results, upstream = [], roots["omni"] / "run"
    for setting in (True, False):
        config = config_of(stage, roots, sample_outputs=setting)
        (result,) = one_rank.run(
            train_with_samples, config=config, run=tmp_path / str(setting), zero=zero,
            upstream=upstream,
        )  # fmt: skip
        results.append(result)
    assert results[0]["losses"] == results[1]["losses"] and len(results[0]["losses"]) == 4
    assert results[0]["draw"] == results[1]["draw"]
    digests = [
        read_export(tmp_path / str(s) / stage / "export", stage).digest for s in (True, False)
    ]
    assert digests[0] == digests[1]
    assert not written(tmp_path / "False", stage)
    at_steps = written(tmp_path / "True", stage)
    assert list(at_steps) == ["step_00000002", "step_00000004"]
    assert all(f"{stage}.json" in names for names in at_steps.values())


@pytest.mark.parametrize(
    ("stage", "zero"), [("thinker", "zero2"), ("thinker", "zero3"), ("sft", "zero3")]
)
def test_ranks_that_share_weights_write_the_same_samples(
    stage: str,
    zero: str,
    roots: dict[str, Path],
    tmp_path: Path,
    two_ranks: RankPool,
    one_rank: RankPool,
) -> None:
    upstream, texts = roots["omni"] / "run", []
    for name, pool, layout in (("one", one_rank, "zero0"), ("two", two_ranks, zero)):
        config = config_of(stage, roots, sample_outputs=True)
        pool.run(
            train_with_samples, config=config, run=tmp_path / name, zero=layout, upstream=upstream
        )
        folder = RunFolder(tmp_path / name, stage).samples / "step_00000002"
        texts.append((folder / f"{stage}.txt").read_text())
    assert texts[0] == texts[1] and texts[0]


def test_experts_of_all_ranks_are_gathered(
    roots: dict[str, Path], tmp_path: Path, two_ranks: RankPool, one_rank: RankPool
) -> None:
    texts = []
    changes = {"training": {"sample_outputs": True, "max_steps": 4, "validate_every": 2}}
    config = moe_config(roots["text"], changes)
    for name, pool, zero in (("one", one_rank, engine(0)), ("two", two_ranks, engine(2, 2))):
        pool.run(
            train_with_samples, config=config, run=tmp_path / name, zero=zero, upstream=tmp_path
        )
        folder = RunFolder(tmp_path / name, "thinker").samples / "step_00000004"
        texts.append((folder / "thinker.txt").read_text())
    assert texts[0] == texts[1] and texts[0]


def test_auto_gathers_no_weights(
    roots: dict[str, Path], tmp_path: Path, two_ranks: RankPool
) -> None:
    for zero, is_written in (("zero1", True), ("zero3", False)):
        two_ranks.run(
            train_with_samples, config=config_of("thinker", roots), run=tmp_path / zero, zero=zero,
            upstream=tmp_path,
        )  # fmt: skip
        assert bool(written(tmp_path / zero, "thinker")) == is_written


def train_with_slow_samples(config: RunConfig, run: Path, seconds: float) -> list[str]:
    """Names of the folders of samples that take `seconds`, if each validation takes 1 s."""
    now = [0.0]

    def write(*arguments: Any) -> list[Any]:
        now[0] += seconds
        folder, name = arguments[2], arguments[4]
        (folder.samples / name).mkdir(parents=True)
        return []

    call = ValidationSamples.__call__

    def call_after_a_second(self: ValidationSamples, engine: Any, step: int, _: float) -> None:
        call(self, engine, step, 1.0)

    with (
        mock.patch.object(samples, "write_samples", write),
        mock.patch.object(ValidationSamples, "__call__", call_after_a_second),
        mock.patch.object(samples, "time", mock.Mock(monotonic=lambda: now[0])),
    ):
        train_with_samples(config, run, "zero1", run)
    return list(written(run, config.stage))


def test_auto_takes_a_tenth_of_the_time_of_validations(
    roots: dict[str, Path], tmp_path: Path, one_rank: RankPool
) -> None:
    config = config_of("thinker", roots, max_steps=9, validate_every=1)
    for seconds, steps in ((0.09, range(1, 10)), (0.25, (1, 3, 5, 8)), (5.0, (1,))):
        (found,) = one_rank.run(
            train_with_slow_samples, config=config, run=tmp_path / str(seconds), seconds=seconds
        )
        assert found == [f"step_{step:08d}" for step in steps], seconds


def train_with_failing_samples(config: RunConfig, run: Path, zero: str) -> dict[str, Any]:
    error = RuntimeError("no memory\nand more")
    with mock.patch.object(samples, "write_samples", side_effect=error):
        return train_with_samples(config, run, zero, run)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_a_failure_ends_the_samples_and_not_the_training(
    zero: str, roots: dict[str, Path], tmp_path: Path, two_ranks: RankPool
) -> None:
    config = config_of("thinker", roots, sample_outputs=True)
    result = two_ranks.run(train_with_failing_samples, config=config, run=tmp_path, zero=zero)[0]
    assert len(result["losses"]) == 4 and not written(tmp_path, "thinker")
