"""Thinker: next-token prediction on held-out text, with a unigram model as the baseline."""

import math

from muomni.data.views.base import Batch
from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.baselines import token_counts, unigram_nats
from muomni.evaluation.metrics.tally import Tally, watch
from muomni.evaluation.report import Metric
from muomni.training.validation import validate


def evaluate(context: EvaluationContext) -> list[Metric]:
    """Perplexity, bits per byte, and next-token accuracy; the baseline is scored on the same tokens."""
    vocab_size = context.stage.tokenizer.vocab_size
    tally = Tally()

    def observe(batch: Batch) -> None:
        tally.add("counts", token_counts(batch["labels"], vocab_size))
        tally.add("num_bytes", batch["num_bytes"])

    metrics = validate(context.stage, context.task, watch(context.batches(), observe))
    for _, batch in context.train_batches():
        tally.add("train_counts", token_counts(batch["labels"], vocab_size))
    sums = tally.reduce()
    counts, train_counts = sums["counts"], sums.get("train_counts")
    perplexity = bits_per_byte = accuracy = None
    if train_counts is not None:
        nats = unigram_nats(train_counts, counts)
        perplexity = math.exp(nats / float(counts.sum()))
        bits_per_byte = nats / math.log(2) / float(sums["num_bytes"])
        accuracy = float(counts[train_counts.argmax()] / counts.sum())
    unigram = "unigram model"
    return [
        Metric("perplexity", metrics["perplexity"], perplexity, unigram),
        Metric("bits_per_byte", metrics["bits_per_byte"], bits_per_byte, unigram),
        Metric(
            "accuracy", metrics["accuracy"], accuracy, "most frequent token", is_lower_better=False
        ),
    ]
