"""Metrics of the Thinker, on one rank and two."""

import math
from pathlib import Path

import pytest
import torch

from muomni.data.shards.manifest import find_datasets
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from tests.evaluation.runs import evaluate
from tests.ranks import RankPool


def test_baseline_is_unigram_model_of_training_tokens(
    three_way_text: Path, thinker_run: Path
) -> None:
    result = evaluate(stage="thinker", run=thinker_run)
    tokenizer = Tokenizer.load(three_way_text / "tokenizer.model")
    texts = {
        split: [
            source.read(i)["txt"].decode()
            for source in [Source(find_datasets(three_way_text, "text"), split)]
            for i in range(len(source))
        ]
        for split in ("train", "test")
    }
    tokens = {
        split: [i for text in some for i in [*tokenizer.encode(text), tokenizer.eos_id]]
        for split, some in texts.items()
    }
    size = tokenizer.vocab_size
    total = len(tokens["train"]) + size
    nats = -sum(math.log((tokens["train"].count(i) + 1) / total) for i in tokens["test"])
    num_bytes = sum(len(text.encode()) for text in texts["test"])
    baselines = result["baselines"]
    assert result["num_samples"] == 31
    assert baselines["perplexity"]["value"] == pytest.approx(math.exp(nats / len(tokens["test"])))
    assert baselines["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / num_bytes)
    # The metrics cover the same tokens and bytes.
    nats_of_model = math.log(result["metrics"]["perplexity"]) * len(tokens["test"])
    bits = result["metrics"]["bits_per_byte"]
    assert bits == pytest.approx(nats_of_model / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize("max_samples", [None, 1, 7])
def test_metrics_do_not_depend_on_number_of_ranks(
    max_samples: int | None, thinker_run: Path, two_ranks: RankPool
) -> None:
    request = {"stage": "thinker", "run": thinker_run, "max_samples": max_samples}
    alone = evaluate(**request)
    for result in two_ranks.run(evaluate, **request):
        assert result["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
        for name, baseline in alone["baselines"].items():
            assert result["baselines"][name]["value"] == pytest.approx(baseline["value"], rel=1e-9)
    assert alone["num_samples"] == (max_samples or 31)


def test_evaluation_is_deterministic_and_restores_grad_mode(thinker_run: Path) -> None:
    torch.manual_seed(1)
    first = evaluate(stage="thinker", run=thinker_run)
    torch.manual_seed(2)
    assert evaluate(stage="thinker", run=thinker_run) == first
    assert torch.is_grad_enabled()
