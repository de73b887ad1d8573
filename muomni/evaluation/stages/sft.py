"""Metrics of the omni model: the loss of right answers, the answers that it gives, what it looks at.

Beside each stands what answers do without any input: the most frequent training answer of the same
kind of task, a unigram model of the answers' tokens, the most frequent code.
"""

from collections import Counter

import torch

from muomni.data.media.decode import decode_audio
from muomni.data.text.turns import find_medium, read_turns
from muomni.data.views.base import Batch
from muomni.errors import DataError
from muomni.evaluation.context import Subject
from muomni.evaluation.metrics.answers import KINDS, answer_tasks
from muomni.evaluation.metrics.codes import CodeCounts
from muomni.evaluation.metrics.free_answers import free_answers
from muomni.evaluation.metrics.tally import Tally, most_common, sum_counts, watch
from muomni.evaluation.metrics.unigram import token_counts, unigram_nats
from muomni.evaluation.report import Metric
from muomni.training.stages.sft.stage import SftStage
from muomni.training.validation import validate

_BLIND = {"image": "a model that sees nothing", "audio": "a model that hears nothing"}


def evaluate(subject: Subject) -> list[Metric]:
    """Teacher-forced metrics, then those of generated answers."""
    stage, vocab_size = subject.stage, subject.stage.tokenizer.vocab_size
    assert isinstance(stage, SftStage)
    tally, codes = Tally(), CodeCounts(stage.codec.config.codebook_size)

    def look(batch: Batch) -> None:
        tally.add("test", token_counts(batch["labels"], vocab_size))
        codes.add("test", batch)

    found = validate(stage, subject.task, watch(subject.batches(), look))
    constants = _fit(subject, stage, tally, codes)
    return [
        *_token_metrics(found, tally),
        *codes.metrics(found, "speech_"),
        *_swap_metrics(found),
        *free_answers(subject, constants),
    ]


def _fit(subject: Subject, stage: SftStage, tally: Tally, codes: CodeCounts) -> dict[str, str]:
    """Count tokens and codes of training answers; the most frequent answer of each kind.

    Every rank must call it. Images are not decoded.
    """
    encoder, tokenizer = stage.view().encoder, stage.tokenizer
    texts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for sample in subject.train_samples():
        try:
            for task in answer_tasks(read_turns(sample)):
                ids = torch.tensor([*encoder.answer_ids(task.answer), tokenizer.eos_id])
                tally.add("train", token_counts(ids, tokenizer.vocab_size))
                texts[task.kind][task.text] += 1
                if task.audio is not None:
                    waveform = torch.from_numpy(decode_audio(find_medium(sample, task.audio)))
                    length = torch.tensor([len(waveform)])
                    coded = stage.codec.encode(
                        waveform[None].to(subject.device), length.to(subject.device)
                    )
                    codes.add("train", coded)
        except DataError:
            continue  # training left it out, too
    frequent = {kind: most_common(sum_counts(texts[kind])) for kind in KINDS}
    return {kind: text for kind, text in frequent.items() if text is not None}


def _token_metrics(found: dict[str, float], tally: Tally) -> list[Metric]:
    """Loss and accuracy of the answers' tokens."""
    sums = tally.reduce()
    test, train = sums["test"], sums.get("train")
    loss = accuracy = None
    if train is not None and test.sum() > 0:
        loss = unigram_nats(train, test) / float(test.sum())
        accuracy = float(test[train.argmax()] / test.sum())
    return [
        Metric("answer_loss", found["answer_loss"], loss, "unigram model of answers"),
        Metric(
            "answer_accuracy", found["answer_accuracy"], accuracy, "most frequent token",
            is_lower_better=False,
        ),
    ]  # fmt: skip


def _swap_metrics(found: dict[str, float]) -> list[Metric]:
    """How much the loss of answers rises when they are given another sample's image (audio clip).

    Nothing rises in a model that does not use them.
    """
    return [
        Metric(f"{kind}_swap_gap", found[f"{kind}_swap_gap"], 0.0, name, is_lower_better=False)
        for kind, name in _BLIND.items()
        if f"{kind}_swap_gap" in found
    ]
