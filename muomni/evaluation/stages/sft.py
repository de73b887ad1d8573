"""Omni model: loss of reference answers, scores of generated answers, and sensitivity to the media.

Baselines do not use the input: the most frequent training answer of the same kind of task, a unigram
model of answer tokens, and the most frequent code.
"""

import torch

from muomni.data.media.decode import decode_audio
from muomni.data.text.turns import find_medium, read_turns
from muomni.data.views.base import Batch
from muomni.errors import DataError
from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.answer_tasks import FrequentAnswers, answer_tasks
from muomni.evaluation.metrics.baselines import CodeCounts, token_counts, unigram_nats
from muomni.evaluation.metrics.generated_answers import score_generated_answers
from muomni.evaluation.metrics.sample_types import sample_type
from muomni.evaluation.metrics.tally import Tally, watch
from muomni.evaluation.report import Metric
from muomni.training.stages.sft.stage import SftStage
from muomni.training.validation import validate

_SWAP_BASELINES = {"image": "a model that ignores images", "audio": "a model that ignores audio"}


def evaluate(context: EvaluationContext) -> list[Metric]:
    """Teacher-forced metrics, followed by those of generated answers."""
    stage, vocab_size = context.stage, context.stage.tokenizer.vocab_size
    assert isinstance(stage, SftStage)
    tally, codes = Tally(), CodeCounts(stage.codec.config.codebook_size)

    def observe(batch: Batch) -> None:
        tally.add("test", token_counts(batch["labels"], vocab_size))
        codes.add("test", batch)

    metrics = validate(stage, context.task, watch(context.batches(), observe))
    constants = _fit_baselines(context, stage, tally, codes)
    return [
        *_token_metrics(metrics, tally),
        *codes.metrics(metrics, "speech_"),
        *_swap_metrics(metrics),
        *score_generated_answers(context, constants),
    ]


def _fit_baselines(
    context: EvaluationContext, stage: SftStage, tally: Tally, codes: CodeCounts
) -> dict[str, str]:
    """Count tokens and codes of training answers; return the most frequent answer by type and kind.

    Decodes no images. A collective.
    """
    encoder, tokenizer = stage.view().encoder, stage.tokenizer
    answers = FrequentAnswers()
    for sample in context.train_samples():
        try:
            for task in answer_tasks(read_turns(sample), sample_type(sample)):
                ids = torch.tensor([*encoder.answer_ids(task.answer), tokenizer.eos_id])
                tally.add("train", token_counts(ids, tokenizer.vocab_size))
                answers.add(task)
                if task.audio is not None:
                    waveform = torch.from_numpy(decode_audio(find_medium(sample, task.audio)))
                    length = torch.tensor([len(waveform)])
                    coded = stage.codec.encode(
                        waveform[None].to(context.device), length.to(context.device)
                    )
                    codes.add("train", coded)
        except DataError:
            continue  # training skips it, too
    return answers.reduce()


def _token_metrics(values: dict[str, float], tally: Tally) -> list[Metric]:
    """Loss (nats per token) and accuracy of answer tokens."""
    sums = tally.reduce()
    test, train = sums["test"], sums.get("train")
    loss = accuracy = None
    if train is not None and test.sum() > 0:
        loss = unigram_nats(train, test) / float(test.sum())
        accuracy = float(test[train.argmax()] / test.sum())
    return [
        Metric("answer_loss", values["answer_loss"], loss, "unigram model of answers"),
        Metric(
            "answer_accuracy", values["answer_accuracy"], accuracy, "most frequent token",
            is_lower_better=False,
        ),
    ]  # fmt: skip


def _swap_metrics(values: dict[str, float]) -> list[Metric]:
    """Increase of the answer loss when the image (audio clip) is replaced by another sample's."""
    return [
        Metric(f"{kind}_swap_gap", values[f"{kind}_swap_gap"], 0.0, name, is_lower_better=False)
        for kind, name in _SWAP_BASELINES.items()
        if f"{kind}_swap_gap" in values
    ]
