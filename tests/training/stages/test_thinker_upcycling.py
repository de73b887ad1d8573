"""Upcycling a dense Thinker: first loss, recorded origin, and errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.checkpoint.export import read_export, write_export
from muomni.config.loading import run_config
from muomni.config.models import ThinkerConfig
from muomni.config.run import RunConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.data.text.tokenizer import Tokenizer
from muomni.distributed.discovery import discover
from muomni.errors import ConfigError, UpstreamError
from muomni.models.language.thinker import Thinker
from muomni.training.session import Request, Session, prepare
from muomni.training.stage import StageContext
from muomni.training.stages.thinker import ThinkerStage, ThinkerTask
from tests.corpora import write_tokenizer
from tests.ranks import RankPool
from tests.training.runs import TINY_THINKER, thinker_config, train

MOE = {
    "num_experts": 4, "num_experts_per_token": 2,
    "expert_intermediate_size": TINY_THINKER["intermediate_size"], "shared_intermediate_size": 16,
}  # fmt: skip


def write_dense(run: Path, tokenizer: Tokenizer) -> ThinkerTask:
    torch.manual_seed(5)
    config = ThinkerConfig.model_validate({**TINY_THINKER, "vocab_size": tokenizer.vocab_size})
    task = ThinkerTask(config)
    about = {"preset": "test", "step": 0}
    folder = run / "thinker" / "export"
    write_export(folder, "thinker", task.thinker.state_dict(), config, tokenizer, {}, about)
    return task


def upcycling(data: Path, dense_run: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    content = {"max_steps": 2}
    config = thinker_config(data, {"training": content}).model_dump()
    config["model"] = {**config["model"], "moe": {**MOE, **(changes or {})}}
    config["options"] = {"upcycle": str(dense_run)}
    return run_config(config)


def open_session(config: RunConfig, run: Path) -> Session:
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    return prepare(Request(config, run, run, engine_json, "never"), discover({}))


def test_the_first_loss_is_that_of_the_dense_model(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    dense = write_dense(tmp_path / "dense", Tokenizer.load(text_data / "tokenizer.model"))
    config, run = upcycling(text_data, tmp_path / "dense"), tmp_path / "sparse"
    session = open_session(config, run)
    dataset = PlannedDataset(session.planned.source, session.stage.view(), config.seed)
    with torch.no_grad():
        logs = [
            dense(dataset[micro].tensors).logs["loss"]
            for micro in session.planned.plan.rank_step(0, 0, 1)
        ]
    total, weight = torch.stack(logs).sum(dim=0).tolist()
    zero = {"zero_optimization": {"stage": 2}, "expert_parallel": {"autoep_size": 2}}
    result = two_ranks.run(train, config=config, run=run, zero=zero)[0]
    assert result["losses"][0] == pytest.approx(total / weight, rel=1e-6)
    assert result["losses"][1] < result["losses"][0]
    export = read_export(run / "thinker" / "export", "thinker")
    origin = read_export(tmp_path / "dense" / "thinker" / "export", "thinker")
    assert export.content["upstream"] == {"thinker": origin.digest}
    export.load_into(Thinker(export.config(ThinkerConfig)))
    # Evaluation does not need the dense run.
    evaluated = ThinkerStage(config, StageContext(session.stage.tokenizer, {}, torch.device("cpu")))
    evaluated.load_export(evaluated.build(), export)


def test_a_dense_run_that_does_not_match_is_rejected(text_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="no export of thinker"):
        open_session(upcycling(text_data, tmp_path / "none"), tmp_path)
    write_dense(tmp_path, Tokenizer.load(text_data / "tokenizer.model"))
    smaller = upcycling(text_data, tmp_path, {"expert_intermediate_size": 32})
    with pytest.raises(ConfigError, match=r"size 32 cannot copy a feed-forward of size 64; set"):
        open_session(smaller, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other / "tokenizer.model", vocab_size=320)
    write_dense(other, Tokenizer.load(other / "tokenizer.model"))
    with pytest.raises(UpstreamError, match=r"the tokenizer of .* is not the one that"):
        open_session(upcycling(text_data, other), tmp_path)
