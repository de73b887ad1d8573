"""Figures of the speech encoder: errors of its transcripts, and how many samples CTC cannot fit."""

from muomni.data.view import Batch
from muomni.evaluation.report import Figure
from muomni.evaluation.subject import Subject
from muomni.evaluation.tally import watch
from muomni.evaluation.transcripts import TranscriptErrors, constant_transcripts
from muomni.training.validation import validate


def evaluate(subject: Subject) -> list[Figure]:
    """WER and CER beside the best constant transcript; the share of samples that CTC cannot fit."""
    tokenizer = subject.stage.tokenizer
    errors = TranscriptErrors(constant_transcripts(subject))

    def look(batch: Batch) -> None:
        for ids, length in zip(batch["labels"].cpu(), batch["label_lengths"].cpu(), strict=True):
            errors.add(tokenizer.decode(ids[:length].tolist()))

    figures = validate(subject.stage, subject.task, watch(subject.batches(), look))
    rates = errors.reduce()
    return [
        rates.figure("wer", "wer", figures["wer"]),
        rates.figure("cer", "cer", figures["cer"]),
        Figure("infeasible_fraction", figures["infeasible_fraction"]),
    ]
