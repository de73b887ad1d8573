"""A new stage is one registry row with a config, a recipe, a view, a stage, and an evaluator.

Nothing else in the product knows the toy stage: it is resolved, planned, trained on two ranks, resumed,
exported, and evaluated by the same code as every other stage.
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.config.loading import resolve
from muomni.config.registry import STAGES
from muomni.errors import ConfigError
from muomni.evaluation.evaluator import run_evaluation
from muomni.evaluation.request import EvaluationRequest
from muomni.pipeline.graph import stage_needs
from muomni.pipeline.runner import Pipeline
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.toy_stage.config import ROW


def train_toy(data: Path, run: Path, num_steps: int) -> dict[str, Any]:
    """Train the toy stage in this rank and evaluate its export."""
    STAGES["toy"] = ROW
    try:
        changes = {"data": {"root": str(data)}, "training": {"max_steps": num_steps}}
        result = train(resolve("toy", "nano", None, changes), run)
        report = run_evaluation(
            EvaluationRequest("toy", run, split="val"), torch.device("cpu")
        ).to_json()
    finally:
        del STAGES["toy"]
    return {**result, "report": report}


def test_it_trains_resumes_exports_and_evaluates(
    two_ranks: RankPool, text_data: Path, tmp_path: Path
) -> None:
    first, _ = two_ranks.run(train_toy, data=text_data, run=tmp_path, num_steps=30)
    assert first["losses"][-1] < 0.5 * first["losses"][0]
    more, other = two_ranks.run(train_toy, data=text_data, run=tmp_path, num_steps=120)
    assert more["step"] == 120 and more["report"] == other["report"]
    baseline = more["report"]["baselines"]["squared_error"]["value"]
    assert more["report"]["metrics"]["squared_error"] < baseline
    assert (tmp_path / "toy" / "export" / "model.safetensors").is_file()


def test_pipeline_knows_it_and_refuses_its_typos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(STAGES, "toy", ROW)
    assert stage_needs()["toy"] == frozenset()
    arguments = argparse.Namespace(
        preset="nano", data="d", run=tmp_path, ranks=2, parallel_stages=1,
        quiet=False, verbose=False, log_level=None,
    )  # fmt: skip
    pipeline = Pipeline(arguments, [])
    configs = pipeline.configs(["toy"])
    pipeline.check(configs)
    pipeline.describe(configs)
    assert "toy: open\n" in capsys.readouterr().out
    typo = Pipeline(arguments, ["toy.model.hiden_size=3"])
    with pytest.raises(ConfigError, match=r"toy: unknown key 'model.hiden_size'.*'hidden_size'"):
        typo.configs(["toy"])
