"""Figures of the Thinker: how well it predicts unseen text, beside a unigram model of its tokens."""

import math

from muomni.data.views.base import Batch
from muomni.evaluation.context import Subject
from muomni.evaluation.metrics.tally import Tally, watch
from muomni.evaluation.metrics.unigram import token_counts, unigram_nats
from muomni.evaluation.report import Figure
from muomni.training.validation import validate


def evaluate(subject: Subject) -> list[Figure]:
    """Perplexity, bits per byte and next-token accuracy; the baseline scores the same tokens."""
    vocab_size = subject.stage.tokenizer.vocab_size
    tally = Tally()

    def look(batch: Batch) -> None:
        tally.add("counts", token_counts(batch["labels"], vocab_size))
        tally.add("num_bytes", batch["num_bytes"])

    figures = validate(subject.stage, subject.task, watch(subject.batches(), look))
    for _, batch in subject.train_batches():
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
        Figure("perplexity", figures["perplexity"], perplexity, unigram),
        Figure("bits_per_byte", figures["bits_per_byte"], bits_per_byte, unigram),
        Figure(
            "accuracy", figures["accuracy"], accuracy, "most frequent token", is_lower_better=False
        ),
    ]
