"""Training on tars without an index: equal steps on all ranks, resume, and refused settings."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.checkpoint.export import read_export
from muomni.config.loading import run_config
from muomni.config.run import RunConfig, StreamSection
from muomni.data.sampling.plan import Batching
from muomni.data.shards.writer import SampleCost, ShardWriter
from muomni.distributed.discovery import Ranks, discover
from muomni.errors import CheckpointError, ConfigError, DataError
from muomni.pipeline.state import has_same_data
from muomni.training.feed import Feed, stream_sizes
from muomni.training.session import Request, Session, prepare
from tests.corpora import sentences, write_text_dataset, write_tokenizer
from tests.media_corpora import WORDS, speech_sample
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train
from tests.training.stages.curves import stage_config

NUM_SHARDS, NUM_SAMPLES = 8, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a dataset for validation, and tars of texts, one with a broken sample."""
    root = tmp_path_factory.mktemp("streamed")
    write_text_dataset(root / "text")
    write_tokenizer(root / "tokenizer.model")
    texts = [text.encode() for text in sentences(NUM_SHARDS * NUM_SAMPLES, seed=3)]
    texts[57] = b"\xff"
    for number in range(NUM_SHARDS):
        with ShardWriter(root / "tars", f"{number:06d}.tar", "train") as writer:
            for place in range(number * NUM_SAMPLES, (number + 1) * NUM_SAMPLES):
                writer.add(f"s{place}", [("txt", texts[place])], "g", SampleCost())
    for sidecar in set((root / "tars").iterdir()) - set((root / "tars").glob("*.tar")):
        sidecar.unlink()
    return root


def streamed(root: Path, changes: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    """A thinker run of 1.5 epochs: 2 ranks take 10 steps of 4 batches of 4 texts per epoch."""
    shards = [str(root / "tars" / "{000000..000007}.tar")]
    stream = {"shards": shards, "samples_per_shard": NUM_SAMPLES}
    content = {
        "data": {"stream": stream, **data},
        "batch": {"seq_len": 64, "global_tokens": 1024, "micro_sequences": 4},
        "training": {"max_steps": 15, "save_every": 7},
    }
    return thinker_config(root, {**content, **(changes or {})})


def open_session(config: RunConfig, ranks: Ranks | None = None) -> Session:
    engine_json = {"zero_optimization": {"stage": 0}}
    return prepare(Request(config, Path(), Path(), engine_json, "never"), ranks or discover({}))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_learns_from_a_stream_and_resumes_with_the_same_losses(
    num_workers: int, root: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = streamed(root, num_workers=num_workers)
    straight = two_ranks.run(train, config=config, run=tmp_path)[0]
    assert [line["step"] for line in straight["curve"]] == list(range(1, 16))
    assert straight["losses"][-1] < 0.9 * straight["losses"][0]
    assert straight["val/loss"] < 6
    # Once in each of two epochs, by one rank or the other.
    assert straight["curve"][-1]["num_bad_samples"] in (1, 2)
    for newer in sorted((tmp_path / "thinker" / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(newer)
    shutil.rmtree(tmp_path / "thinker" / "export")
    resumed = two_ranks.run(train, config=config, run=tmp_path)[0]
    assert resumed["losses"] == straight["losses"]
    data = read_export(tmp_path / "thinker" / "export", "thinker").content["data"]
    assert data["fingerprint"].startswith("stream:") and "000007.tar:20" in data["fingerprint"]


def test_epoch_length_is_known_without_reading(root: Path) -> None:
    epochs = {"training": {"max_epochs": 3, "max_steps": None}}
    for num_ranks in (1, 2, 4):
        session = open_session(streamed(root, epochs), Ranks(0, 0, num_ranks))
        assert session.num_steps == 3 * session.feed.num_steps(1) == 30
        assert session.feed.num_samples == 160


def batches_of(feed: Feed, step: int, count: int) -> list[dict[str, torch.Tensor]]:
    loaded = iter(feed.loader(step))
    return [next(loaded) for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_reading_a_step_again_gives_the_batches_of_the_loader(
    is_streamed: bool, num_workers: int, root: Path
) -> None:
    config = streamed(root, num_workers=num_workers)
    if not is_streamed:
        content = config.model_dump()
        content["data"]["stream"] = None
        config = run_config(content)
    feed = open_session(config, Ranks(1, 1, 2)).feed
    for step in (0, 3, 11):
        read = feed.read(step)
        assert len(read) == 2 and len(feed.read(step, 1)) == 1
        for again, loaded in zip(read, batches_of(feed, step, 2), strict=True):
            assert again.batch.keys() == loaded.keys()
            assert all(torch.equal(again.batch[name], loaded[name]) for name in loaded)
            assert all(origin["key"] and origin["shard"] for origin in again.origins)


def test_other_streams_have_other_digests(root: Path) -> None:
    digest = open_session(streamed(root)).feed.digest
    assert open_session(streamed(root), Ranks(1, 1, 2)).feed.digest == digest
    assert open_session(streamed(root, num_workers=2)).feed.digest == digest
    other = streamed(root).model_dump()
    other["data"]["stream"]["samples_per_shard"] = 19
    assert open_session(run_config(other)).feed.digest != digest


def test_a_pipeline_detects_the_stream_of_an_export(root: Path) -> None:
    session = open_session(streamed(root))
    data, tokenizer = {"fingerprint": session.feed.fingerprint}, session.stage.tokenizer.digest
    assert has_same_data(streamed(root), data, tokenizer)
    assert not has_same_data(streamed(root), data, "another")
    other = streamed(root).model_dump()
    other["data"]["stream"]["samples_per_shard"] = 19
    assert not has_same_data(run_config(other), data, tokenizer)


def test_a_run_does_not_resume_with_another_stream(
    root: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    training = {"max_steps": 2}
    one_rank.run(train, config=streamed(root, {"training": training}), run=tmp_path)
    changed = streamed(root, {"training": training}).model_dump()
    changed["data"]["stream"]["shards"] = [str(root / "tars" / "{000000..000006}.tar")]
    with pytest.raises(CheckpointError, match="was written with other data"):
        one_rank.run(train, config=run_config(changed), run=tmp_path)


def test_a_root_may_hold_a_tokenizer_only(root: Path, tmp_path: Path, one_rank: RankPool) -> None:
    shutil.copy(root / "tokenizer.model", tmp_path)
    content = streamed(root, {"training": {"max_steps": 2}}).model_dump()
    content["data"]["root"] = str(tmp_path)
    with pytest.raises(DataError, match="has no complete dataset"):
        open_session(run_config(content))
    content["data"]["stream"]["has_val"] = False
    result = one_rank.run(train, config=run_config(content), run=tmp_path / "run")[0]
    assert result["step"] == 2 and "val/loss" not in result
    assert (tmp_path / "run" / "thinker" / "export").is_dir()


def test_a_missing_shard_is_reported_before_the_start(root: Path) -> None:
    config = streamed(root).model_dump()
    config["data"]["stream"]["shards"] = [str(root / "tars" / "{000007..000008}.tar")]
    with pytest.raises(DataError, match=r"000008\.tar of data.stream does not exist"):
        open_session(run_config(config))


def stop_at_the_broken_shard(config: RunConfig, run: Path) -> dict[str, Any] | None:
    """The error of a rank that reads a broken shard; None if another rank does."""
    try:
        train(config, run)
    except DataError as error:
        return {"text": str(error), "is_rank_local": error.is_rank_local}
    return None


def test_a_rank_reports_its_local_error_itself(
    root: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tar")
    config = streamed(root).model_dump()
    config["data"]["stream"]["shards"] = [str(broken)]
    settings = {"config": run_config(config), "run": tmp_path / "run"}
    said = one_rank.run(stop_at_the_broken_shard, **settings)[0]
    assert said["is_rank_local"]
    assert said["text"].startswith(f"rank 0: cannot read {broken}")


def test_stages_that_batch_by_seconds_need_numbers_of_samples() -> None:
    section = {"shards": ["a.tar"], "samples_per_shard": 5}
    without = StreamSection(**section)
    with_numbers = StreamSection(**section, samples_per_step=12, samples_per_micro_batch=6)
    bucket, packed = Batching("bucket", 200, 100), Batching("pack", 6, 3, seq_len=64)
    with pytest.raises(ConfigError, match=r"data\.stream\.samples_per_step"):
        stream_sizes(without, bucket, "talker")
    assert stream_sizes(with_numbers, bucket, "talker") == (12, 6)
    assert stream_sizes(without, packed, "thinker") == (6, 3)
    with pytest.raises(ConfigError, match="takes 6 samples per step from a stream"):
        stream_sizes(with_numbers, packed, "thinker")


def test_speech_trains_from_a_stream(root: Path, tmp_path: Path, one_rank: RankPool) -> None:
    data = tmp_path / "data"
    for number in range(2):
        with ShardWriter(data, f"{number}.tar", "train") as writer:
            for place in range(12):
                words = [WORDS[(place + number) % len(WORDS)], WORDS[place % len(WORDS)]]
                key, members, cost = speech_sample(f"u{number}_{place}", words, seed=place)
                writer.add(key, members, key, cost)
    shutil.copy(root / "tokenizer.model", data)
    stream = {
        "shards": [str(data / "{0,1}.tar")], "samples_per_shard": 12, "samples_per_batch": 3,
        "has_val": False,
    }  # fmt: skip
    config = stage_config("audio_encoder", data, {"data": {"stream": stream}})
    result = one_rank.run(train, config=config, run=tmp_path / "run")[0]
    assert len(result["losses"]) == 8 and result["losses"][-1] < result["losses"][0]


def test_mix_and_stream_exclude_each_other() -> None:
    stream = {"shards": ["a.tar"], "samples_per_shard": 5}
    with pytest.raises(ConfigError, match=r"data\.mix needs sharded datasets"):
        thinker_config(Path(), {"data": {"stream": stream, "mix": {"alpha": 0.5}}})
    with pytest.raises(ConfigError, match="at least 1 item"):
        thinker_config(Path(), {"data": {"stream": {**stream, "shards": []}}})
