"""Runs with exports of untrained models, and datasets with a test split."""

from pathlib import Path
from typing import Any

import torch

from muomni.checkpoint.export import find_exports, write_export
from muomni.config.registry import load, stage_spec
from muomni.config.run import RunConfig
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.writer import SampleCost
from muomni.data.text.tokenizer import Tokenizer
from muomni.evaluation.evaluator import run_evaluation
from muomni.evaluation.request import EvaluationRequest
from muomni.run_folder import RunFolder
from muomni.training.stage import Stage, StageContext
from tests.corpora import sentences, write_dataset

CPU = torch.device("cpu")


def write_texts(root: Path, texts: dict[str, list[str]], key: str | None = None) -> Manifest:
    """Write a text dataset; keys and groups are `key` (default: the split) plus the index."""
    return write_dataset(
        root,
        "text",
        {
            split: [
                (
                    f"{key or split}{i:05d}",
                    [("txt", text.encode())],
                    SampleCost(num_chars=len(text)),
                )
                for i, text in enumerate(documents)
            ]
            for split, documents in texts.items()
        },
    )


def three_splits() -> dict[str, list[str]]:
    return {"train": sentences(120, 1), "val": sentences(10, 2), "test": sentences(31, 3)}


def untrained_export(config: RunConfig, run: Path, upstream_run: Path | None = None) -> Stage:
    """Export the freshly initialized model of a stage, with its config."""
    tokenizer = Tokenizer.load(Path(config.data.root) / "tokenizer.model")
    spec = stage_spec(config.stage)
    stage_type = load(spec.stage)
    upstream = find_exports(upstream_run or run, spec.upstream)
    stage = stage_type(config, StageContext(tokenizer, upstream, CPU))
    torch.manual_seed(0)
    model = stage.model(stage.build())
    folder = RunFolder(run, config.stage)
    folder.create()
    about = {
        "config": config.model_dump(mode="json"),
        "upstream": {name: export.digest for name, export in upstream.items()},
        "resolved": {"upstream": str(upstream_run or run)},
    }
    state = {**model.state_dict(), **stage.frozen_state()}
    state = {name: tensor.clone() for name, tensor in state.items()}
    write_export(folder.export, config.stage, state, stage.model_config(), tokenizer, {}, about)
    return stage


def evaluate(**arguments: Any) -> dict[str, Any]:
    """Return the report of an evaluation as JSON; picklable, for `RankPool.run`."""
    return run_evaluation(EvaluationRequest(**arguments), CPU).to_json()


def answers(**arguments: Any) -> list[dict[str, Any]]:
    """Return the generated answers of an evaluation; picklable, for `RankPool.run`."""
    return list(run_evaluation(EvaluationRequest(**arguments), CPU).answers)
