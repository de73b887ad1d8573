"""Metrics of the speech encoder: errors of its transcripts, and how many samples CTC cannot fit."""

from muomni.data.views.base import Batch
from muomni.evaluation.context import Subject
from muomni.evaluation.metrics.transcripts import TranscriptErrors
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.training_transcripts import TrainingTranscripts
from muomni.training.outputs import StageOutput
from muomni.training.stages.audio_encoder import AudioEncoderStage, AudioEncoderTask
from muomni.training.validation import validate


def evaluate(subject: Subject) -> list[Metric]:
    """WER and CER of the best path and WER with the word list of training, beside the best constant
    transcript; the share of samples that CTC cannot fit.
    """
    stage, task = subject.stage, subject.task
    assert isinstance(stage, AudioEncoderStage) and isinstance(task, AudioEncoderTask)
    transcripts = TrainingTranscripts(subject)
    decoder = transcripts.word_decoder(stage.view().units)
    errors = TranscriptErrors(transcripts.constants())

    def forward(batch: Batch) -> StageOutput:
        logits, frame_lengths = task.listen(batch)
        heard = [[]] * len(logits) if decoder is None else decoder.decode(logits, frame_lengths)
        labels = zip(batch["labels"].cpu(), batch["label_lengths"].cpu(), strict=True)
        for (ids, length), words in zip(labels, heard, strict=True):
            errors.add(stage.tokenizer.decode(ids[:length].tolist()), words=" ".join(words))
        return task.score(batch, logits, frame_lengths)

    metrics = validate(stage, forward, subject.batches())
    rates = errors.reduce()
    with_list = rates.metric("wer", "wer_with_word_list", rates.rate("wer", "words"))
    return [
        rates.metric("wer", "wer", metrics["wer"]),
        *([] if decoder is None else [with_list]),
        rates.metric("cer", "cer", metrics["cer"]),
        Metric("infeasible_fraction", metrics["infeasible_fraction"]),
    ]
