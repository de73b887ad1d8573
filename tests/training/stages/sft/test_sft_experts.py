"""Stage sft with a mixture-of-experts Thinker, sharded over ranks by AutoEP."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.checkpoint.export import read_export, write_export
from muomni.config.models import OmniConfig, ThinkerConfig
from muomni.config.run import RunConfig
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import ConfigError
from muomni.models.language.thinker import Thinker
from muomni.models.omni import OmniModel
from tests.conversations import SIZES
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.sft.omni_runs import omni_run, write_root

MOE = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 24}
THINKER = {**SIZES["thinker"], "moe": MOE}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root whose Thinker export has experts."""
    root = write_root(tmp_path_factory.mktemp("sft"))
    tokenizer = Tokenizer.load(root / "tokenizer.model")
    torch.manual_seed(5)
    model = Thinker(ThinkerConfig(**THINKER, vocab_size=tokenizer.vocab_size))
    about = {"preset": "nano", "step": 0}
    folder = root / "run" / "thinker" / "export"
    write_export(folder, "thinker", model.state_dict(), model.config, tokenizer, {}, about)
    return root


def sft(root: Path, freeze: list[str] | None = None) -> RunConfig:
    changes = {"model": {"thinker": THINKER}, "options": {"freeze": freeze or ["audio_encoder.*"]}}
    return omni_run("sft", root, changes)


def engine(zero: int, num_expert_ranks: int) -> dict[str, Any]:
    content: dict[str, Any] = {"zero_optimization": {"stage": zero}}
    if num_expert_ranks:
        content["expert_parallel"] = {"autoep_size": num_expert_ranks}
    return content


@pytest.mark.parametrize("zero", [1, 3])
def test_sharded_experts_train_and_export_like_replicated_ones(
    zero: int, root: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    """Ranks with different modalities still run the same all-to-alls."""
    config, upstream = sft(root), root / "run"
    arguments = {"config": config, "upstream": upstream}
    whole = one_rank.run(train, **arguments, run=tmp_path / "1", zero=engine(0, 0))[0]
    divided = two_ranks.run(train, **arguments, run=tmp_path / "2", zero=engine(zero, 2))[0]
    assert divided["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    for metric in ("grad_norm", "moe/balance_loss", "moe/max_load"):
        expected = [line[metric] for line in whole["curve"]]
        got = [line[metric] for line in divided["curve"]]
        assert got == pytest.approx(expected, rel=1e-3), metric
    export = read_export(tmp_path / "2" / "sft" / "export", "sft")
    model = OmniModel(export.config(OmniConfig), with_codec=True)
    export.load_into(model)
    expected_state = read_export(tmp_path / "1" / "sft" / "export", "sft").state()
    for name, tensor in export.state().items():
        torch.testing.assert_close(tensor, expected_state[name], atol=1e-3, rtol=1e-3, msg=name)


def test_frozen_experts_are_not_sharded(root: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    config = sft(root, ["thinker.*"])
    with pytest.raises(ConfigError, match="shards experts, but none is trained"):
        two_ranks.run(train, config=config, run=tmp_path, zero=engine(1, 2), upstream=root / "run")
