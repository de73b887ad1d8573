"""Dropout and augmentation depend on the sample and the epoch, not on the rank or the layout."""

from pathlib import Path

import pytest
from torch import Tensor

from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks
from muomni.training.session import Request, prepare
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

SEEDS = {
    "audio_encoder": ("seeds",), "talker": ("seeds",), "sft": ("speech_seeds", "audio_seeds")
}  # fmt: skip


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


def seeds(
    config: RunConfig, upstream: Path, ranks: Ranks, step: int = 0
) -> list[dict[str, Tensor]]:
    """Seeds of each micro-batch that a rank reads in a step."""
    session = prepare(Request(config, Path("none"), upstream, {}, "never"), ranks)
    batches = [read.batch for read in session.feed.read(step)]
    return [{name: batch[name] for name in SEEDS[config.stage]} for batch in batches]


def values(batches: list[dict[str, Tensor]]) -> list[int]:
    """All seeds; 0 is that of an empty slot."""
    found = [seed for batch in batches for part in batch.values() for seed in part.tolist()]
    return [seed for seed in found if seed]


@pytest.mark.parametrize("stage", SEEDS)
def test_every_rank_draws_its_own_and_all_layouts_the_same(
    stage: str, media_data: Path, omni_root: Path
) -> None:
    is_perception = stage == "audio_encoder"
    config = stage_config(stage, media_data) if is_perception else omni_run(stage, omni_root)
    upstream = omni_root / "run"
    alone = values(seeds(config, upstream, Ranks()))
    shared = [values(seeds(config, upstream, Ranks(rank, rank, 2))) for rank in range(2)]
    assert all(shared) and len(set(alone)) == len(alone)
    assert sorted([*shared[0], *shared[1]]) == sorted(alone)
    # After more samples than there are, epochs repeat them with new seeds.
    later = values(seeds(config, upstream, Ranks(), step=60))
    assert later and not set(later) & set(alone)
