"""A run folder can be moved: a resume works from another working directory, and so does an evaluation."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from muomni.checkpoint.export import read_export
from muomni.config.loading import read_yaml, run_config
from muomni.config.run import RunConfig
from muomni.evaluation.evaluator import run_evaluation
from muomni.evaluation.request import EvaluationRequest
from muomni.run_folder import RunFolder
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train

NAME = "codec.x run #1"  # looks like a stage's argument, and has a space


def train_in(folder: Path, config: RunConfig, run: Path) -> dict[str, Any]:
    os.chdir(folder)
    return train(config, run)


def evaluate_in(folder: Path, run: Path) -> dict[str, Any]:
    os.chdir(folder)
    request = EvaluationRequest("thinker", run, split="val")
    return run_evaluation(request, torch.device("cpu")).to_json()


def state_of(folder: RunFolder, step: int) -> dict[str, Any]:
    checkpoint = folder.checkpoints / f"step_{step:08d}" / "complete.json"
    return json.loads(checkpoint.read_text())["state"]


def test_a_moved_run_resumes_and_evaluates_from_another_folder(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    settings = {"folder": tmp_path / "a", "config": config, "run": Path(NAME)}
    (first,) = one_rank.run(train_in, **settings)
    moved = tmp_path / "b" / "moved"
    shutil.move(tmp_path / "a" / NAME, moved)
    folder = RunFolder(moved, "thinker")
    recorded = read_yaml(folder.config_file)
    check_record(recorded, config)
    assert read_export(folder.export, "thinker").content["resolved"] == recorded["resolved"]
    assert str(tmp_path / "a") not in json.dumps(recorded)
    # Values on fewer samples are not compared with the earlier best.
    changes = {"training": {"max_steps": 4, "validate_samples": 3}}
    longer = thinker_config(text_data, changes)
    settings = {"folder": tmp_path / "b", "config": longer, "run": Path("moved")}
    (resumed,) = one_rank.run(train_in, **settings)
    assert resumed["step"] == 4 and resumed["losses"][:2] == first["losses"]
    assert state_of(folder, 2)["best_of"] != state_of(folder, 4)["best_of"]
    assert state_of(folder, 4)["best"] == resumed["val/loss"]
    (report,) = one_rank.run(evaluate_in, folder=tmp_path / "c", run=moved)
    digest = read_export(folder.export, "thinker").digest
    assert report["measured_on"] == {"thinker/export": digest}


def check_record(recorded: dict[str, Any], config: RunConfig) -> None:
    resolved = recorded["resolved"]
    facts = {
        name: resolved[name] for name in ("upstream", "ranks", "nodes", "precision", "zero_stage")
    }
    assert facts == {"upstream": ".", "ranks": 1, "nodes": 1, "precision": "fp32", "zero_stage": 1}
    assert resolved["deepspeed"]["zero_optimization"]["stage"] == 1
    assert resolved["deepspeed"]["gradient_clipping"] == config.optim.max_grad_norm
    assert {"muomni", "torch", "deepspeed"} <= resolved["versions"].keys()
    assert Path(recorded["data"]["root"]).is_absolute() and "python" in resolved
    assert run_config(recorded) == config
