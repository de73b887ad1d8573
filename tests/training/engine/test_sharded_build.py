"""A build for ZeRO 3: the weights of an ordinary one, of which no rank ever holds more than a part."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks, discover
from muomni.models.language.thinker import Thinker
from muomni.training.engine import sharded_build
from muomni.training.engine.ds_config import complete
from muomni.training.engine.sharded_build import RecordedBuild
from muomni.training.planning.live_bytes import LiveBytes
from muomni.training.session import Request, open_loop, prepare, seed_everything
from tests.ranks import RankPool
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}
LARGE = {"hidden_size": 256, "num_layers": 6, "intermediate_size": 512, "head_dim": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 32}


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


@pytest.mark.parametrize(
    "name",
    ["thinker", "thinker-moe", "audio_encoder", "vision_encoder", "codec", "talker", "sft"],
)
def test_weights_and_random_numbers_are_those_of_an_ordinary_build(
    name: str,
    text_data: Path,
    media_data: Path,
    omni_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharded_build, "_LEAST_ELEMENTS", 200)  # the models are small
    run = Path()
    if name.startswith("thinker"):
        experts = {"model": {"moe": EXPERTS}} if name == "thinker-moe" else {}
        config = thinker_config(text_data, experts)
    elif name in ("talker", "sft"):
        config, run = omni_run(name, omni_root, {}), omni_root / "run"
    else:
        config = stage_config(name, media_data)
    stage = prepare(Request(config, run, run, ZERO3, "never"), Ranks(0, 0, 2)).stage
    seed_everything(1)
    expected = stage.build()
    following = torch.rand(3)
    seed_everything(1)
    with RecordedBuild() as build:
        task = stage.build()
    assert torch.equal(torch.rand(3), following)
    large = [parameter for parameter in task.parameters() if parameter.is_meta]
    assert sum(p.numel() for p in large) > 0.8 * sum(p.numel() for p in task.parameters())
    for (found_name, found), (other_name, wanted) in zip(
        task.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert found_name == other_name
        assert torch.equal(build.value(found), wanted), found_name
    for (_, found), (other_name, wanted) in zip(
        task.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(found, wanted), other_name


def _largest_part(config: RunConfig, run: Path) -> tuple[float, float]:
    """The peak of memory while a model is built and sharded, and its shards: as fractions of the fp32 model."""
    session = prepare(Request(config, run, run, ZERO3, "never"), discover())
    full = complete(ZERO3, config, "bf16", False, 2)
    with LiveBytes(lambda: "all") as live:
        with RecordedBuild() as build:
            task = session.stage.build()
        num_bytes = 4 * sum(parameter.numel() for parameter in task.parameters())
        sharded_build.shard(task, build, full, torch.bfloat16)
    return sum(live.peak.values()) / num_bytes, sum(live.now.values()) / num_bytes


def test_no_rank_holds_half_of_the_model(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"model": LARGE, "precision": "bf16"})
    for peak, kept in two_ranks.run(_largest_part, config=config, run=tmp_path):
        assert kept == pytest.approx(0.25, rel=0.05)  # half of the weights, in 16 bits
        assert peak < 0.5


def _first_weights(config: RunConfig, run: Path, stage: int) -> dict[str, torch.Tensor]:
    engine_json = {"zero_optimization": {"stage": stage}}
    loop = open_loop(prepare(Request(config, run, run, engine_json, "never"), discover()))
    try:
        assert isinstance(loop.stage.model(loop.engine.task), Thinker)
        return loop.engine.full_state("thinker.")
    finally:
        loop.engine.deepspeed.destroy()


def test_a_run_starts_with_the_same_weights_under_any_stage(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"model": {"tie_embeddings": True}})
    plain, sharded = (
        two_ranks.run(_first_weights, config=config, run=tmp_path, stage=stage) for stage in (1, 3)
    )
    assert plain[1] == sharded[1] == {}  # gathered for rank 0 alone
    assert plain[0].keys() == sharded[0].keys()
    for name, weight in plain[0].items():
        assert torch.equal(weight, sharded[0][name]), name
